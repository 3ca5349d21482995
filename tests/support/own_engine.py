"""A real engine whose host is the test's own process."""

import pytest
import torch

from shared.worker.vllm_engine import START_METHOD, EngineSettings, VllmEngine


async def start_engine(settings: EngineSettings) -> VllmEngine:
    """Spawned: here stores run in threads and torch has computed, so a copy of this process would hang (ADR 24)."""
    threads = torch.get_num_threads()
    try:
        with pytest.MonkeyPatch.context() as environ:
            environ.setenv(START_METHOD, "spawn")
            return await VllmEngine.start(settings)
    finally:
        torch.set_num_threads(threads)
