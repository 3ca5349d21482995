"""A worker that joins a cluster of another model."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.errors import SettingsError
from shared.worker.neighbours import Neighbours
from tests.support.fake_workers import FakeWorker, Handoffs
from tests.support.worker_environ import sim_worker

ROOT = Path(__file__).parents[2]


async def test_a_stranger_is_told_and_ends(nats_url: str, tiny_model: Path) -> None:
    other = await FakeWorker(nats_url, Handoffs(), worker="prefill-0", role="prefill", model="llama").start()
    environ = sim_worker(nats_url, tiny_model, "test")
    try:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.decode_worker", env=environ, cwd=ROOT, stderr=subprocess.PIPE
        )
        async with asyncio.timeout(30):
            _, said = await worker.communicate()
    finally:
        await other.die()
    assert worker.returncode == 2
    last = said.decode().splitlines()[-1]
    assert last.startswith("baton decode: setting 'served_model_name': prefill-0 serves 'llama' and this worker would")


@pytest.mark.parametrize(("models", "is_welcome"), [([], True), (["a", "b"], True), (["b"], True), (["a", "c"], False)])
async def test_who_is_welcome(nats_url: str, models: list[str], is_welcome: bool) -> None:
    bus = await Bus.connect(nats_url, "test")
    workers = [
        await FakeWorker(nats_url, Handoffs(), worker=f"w-{one}", role="decode", model=one, cluster="mine").start()
        for one in models
    ]
    try:
        neighbours = await Neighbours.listen(bus, "mine")
        if is_welcome:
            await neighbours.check("b")
        else:
            with pytest.raises(SettingsError, match=r"serves '[ac]'"):
                await neighbours.check("b")
    finally:
        for worker in workers:
            await worker.die()
        await bus.close()
