"""A real engine whose host is the test's own process."""

import pytest

from shared.worker.vllm_engine import START_METHOD, EngineSettings, VllmEngine


async def start_engine(settings: EngineSettings) -> VllmEngine:
    """Spawned: here stores run in threads and tests have computed, so a copy of this process could hang (ADR 24)."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv(START_METHOD, "spawn")
        return await VllmEngine.start(settings)
