"""A worker whose end hangs."""

import asyncio
import signal
import sys
from pathlib import Path

from tests.support.worker_environ import sim_worker

ROOT = Path(__file__).parents[2]
HANGS = """
import asyncio
from shared.worker import host

async def never(_engine):
    await asyncio.Event().wait()

host.END_S = 1.0
host.SimEngine.close = never
host.main("decode")
"""


async def test_it_ends_all_the_same_and_says_where(nats_url: str, tiny_model: Path) -> None:
    environ = sim_worker(nats_url, tiny_model, "end")
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HANGS, env=environ, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    assert worker.stderr is not None
    async with asyncio.timeout(60):
        async for line in worker.stderr:
            if b"ready: takes decode" in line:
                break
        worker.send_signal(signal.SIGTERM)
        said = (await worker.stderr.read()).decode()
        assert await worker.wait() == 1
    assert "Timeout (0:00:01)!" in said
    assert "host.py" in said
