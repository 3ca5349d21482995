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


async def held(jobs: Jobs, request: str, gateway: str = "gateway-0") -> tuple[list[BatonError | None], asyncio.Event]:
    """A job that runs until its event is set, and why it ended: None when it was not stopped."""
    begun, end, told = asyncio.Event(), asyncio.Event(), list[BatonError | None]()

    async def work() -> None:
        begun.set()
        try:
            await end.wait()
        except asyncio.CancelledError:
            told.append(jobs.stopped())
            raise
        told.append(None)

    jobs.spawn((request, 0), work(), gateway)
    await begun.wait()
    return told, end


async def test_a_drain_waits_then_stops_the_rest_with_its_verdict() -> None:
    jobs = Jobs()
    (short, end), (long, _) = await held(jobs, "short"), await held(jobs, "long")
    asyncio.get_running_loop().call_later(0.01, end.set)
    await jobs.drain(0.1, Draining("this worker is shutting down"))
    assert len(jobs) == 0
    assert short == [None]
    assert [str(error) for error in long] == ["this worker is shutting down"]
    assert isinstance(long[0], Draining)


async def test_a_cancel_is_told_as_one_and_bars_a_job_that_comes_behind_it() -> None:
    jobs = Jobs()
    told, _ = await held(jobs, "r")
    for request in ("r", "late"):
        await jobs.cancel((request, 0), now=1.0)
    assert [type(error) for error in told] == [Cancelled]
    for request in ("r", "late"):
        with pytest.raises(Cancelled):
            await held(jobs, request)
    assert len(jobs) == 0


async def test_the_jobs_of_a_dead_gateway_are_stopped_and_no_others() -> None:
    jobs = Jobs()
    (told, _), (other, end) = await held(jobs, "r"), await held(jobs, "other", "gateway-1")
    assert jobs.abandon("gateway-0") == 1
    await asyncio.sleep(0)
    assert [type(error) for error in told] == [Cancelled]
    await asyncio.sleep(0)
    assert len(jobs) == 1
    end.set()
    await asyncio.sleep(0)
    assert other == [None]
    await asyncio.sleep(0)
    assert jobs.abandon("gateway-1") == 0
