"""What counts as a sign of life, and why a job was stopped."""

import asyncio

import pytest

from shared.errors import BatonError, Cancelled, Draining
from shared.worker.jobs import Jobs
from shared.worker.liveness import Liveness


def test_silence_grows_until_the_next_sign() -> None:
    liveness = Liveness(100.0)
    assert [liveness.look(100.0 + second) for second in range(1, 5)] == [1, 2, 3, 4]
    liveness.sign(104.5)
    assert liveness.look(105.0) == 0.5


def test_time_in_which_nobody_looked_does_not_count() -> None:
    liveness = Liveness(0.0)
    assert [liveness.look(float(second)) for second in (1, 2, 3)] == [1, 2, 3]
    assert liveness.look(100.0) == 3.0  # this process was stopped, the engine may have been too
    assert liveness.look(101.0) == 4.0


def test_a_sign_after_a_long_absence_does_not_lie_in_the_future() -> None:
    liveness = Liveness(0.0)
    liveness.sign(99.0)
    assert liveness.look(100.0) == 0.0
    assert liveness.look(101.0) == 1.0


async def held(jobs: Jobs, request: str) -> tuple["asyncio.Task[None]", asyncio.Event]:
    """A job that runs until its event is set."""
    begun, end = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await end.wait()

    task = asyncio.create_task(jobs.run((request, 0), work(), "gateway-0"))
    await begun.wait()
    return task, end


async def test_a_drain_waits_then_stops_the_rest_with_its_verdict() -> None:
    jobs = Jobs()
    (short, end), (long, _) = await held(jobs, "short"), await held(jobs, "long")
    asyncio.get_running_loop().call_later(0.01, end.set)
    await jobs.drain(0.1, Draining("this worker is shutting down"))
    assert len(jobs) == 0
    assert await short is None
    with pytest.raises(Draining, match="shutting down"):
        await long


async def test_a_cancel_is_told_as_one() -> None:
    jobs = Jobs()
    task, _ = await held(jobs, "r")
    await jobs.cancel(("r", 0), now=1.0)
    with pytest.raises(BatonError) as stopped:
        await task
    assert isinstance(stopped.value, Cancelled)


async def test_the_jobs_of_a_dead_gateway_are_stopped_and_no_others() -> None:
    jobs = Jobs()
    task, _ = await held(jobs, "r")
    end = asyncio.Event()
    other = jobs.spawn(("other", 0), end.wait(), "gateway-1")
    assert jobs.abandon("gateway-0") == 1
    with pytest.raises(Cancelled):
        await task
    assert len(jobs) == 1
    end.set()
    assert await other
    assert jobs.abandon("gateway-1") == 0
