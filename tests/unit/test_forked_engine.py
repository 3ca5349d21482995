"""EngineCore as a copy of its host: who says so, and whose signals are whose."""

import asyncio
import contextlib
import os
import signal

import pytest
import uvloop

from shared.worker import vllm_engine


@pytest.mark.parametrize(
    ("is_cpu", "is_clean", "executor", "wished", "forked"),
    [
        (True, True, "uni", "", True),
        (True, True, "uni", "fork", True),
        (True, True, "uni", "spawn", False),
        (True, True, "mp", "", False),
        (True, False, "uni", "fork", False),
        (False, True, "uni", "", False),
    ],
)
def test_only_one_process_on_cpus_is_a_copy(is_cpu, is_clean, executor, wished, forked):
    assert vllm_engine.is_forked(executor, is_cpu=is_cpu, is_clean=is_clean, wished=wished) is forked


@pytest.mark.parametrize("leaves", [True, False])
def test_a_signal_to_the_copy_is_not_the_host_s(monkeypatch, leaves):
    """Without letting go of the host's pipe it is: else this would show nothing."""
    hooks = {}
    monkeypatch.setattr(os, "register_at_fork", hooks.update)
    vllm_engine.leave_host_when_forked(threads=1)

    async def host() -> bool:
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
        ready, says = os.pipe()
        if not (copy := os.fork()):  # before any other thread is there
            if leaves:
                hooks["after_in_child"]()
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            os.write(says, b"x")
            while True:
                signal.pause()
        os.read(ready, 1)
        os.kill(copy, signal.SIGTERM)
        await asyncio.to_thread(os.waitpid, copy, 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await told.wait()
        return told.is_set()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(host()) is not leaves
