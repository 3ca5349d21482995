"""TokenBatch to requests: order, holes, strangers, limits."""

import asyncio

import pytest

from services.gateway import streams as module
from services.gateway.streams import Streams
from shared import wire
from shared.errors import BusUnavailable, Cancelled, EngineFailed, Internal, OutputLost, WorkerLost, WorkerStalled


def batch(*rows, **columns) -> wire.TokenBatch:
    """rows: (request, attempt, sequence, choice)"""
    return wire.TokenBatch(
        worker="d",
        requests=[row[0] for row in rows],
        attempts=[row[1] for row in rows],
        sequences=[row[2] for row in rows],
        choices=[row[3] for row in rows],
        texts=[str(row[2]) for row in rows],
        tokens=[wire.pack_tokens([row[2]]) for row in rows],
        **columns,
    )


STOP = wire.Finish(reason="stop")


@pytest.fixture
def strangers():
    return []


@pytest.fixture
def streams(strangers):
    return Streams(lambda *what: strangers.append(what))


async def test_rows_arrive_in_order_and_end(streams):
    stream = streams.open("r", 0, 1)
    streams.put(batch(("r", 0, 0, 0)), 0.0)
    streams.put(batch(("r", 0, 1, 0), finish={"0": STOP}, usage={"0": wire.DecodeUsage(completion_tokens=2)}), 0.0)
    assert [row.text for row in await stream.read()] == ["0", "1"]
    assert await stream.read() == []
    assert stream.usage.completion_tokens == 2
    assert stream.tokens == 2


async def test_a_waiting_reader_is_woken(streams):
    stream = streams.open("r", 0, 1)
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    streams.put(batch(("r", 0, 0, 0)), 0.0)
    assert len(await reading) == 1


async def test_n_choices_end_together(streams):
    stream = streams.open("r", 0, 2)
    streams.put(batch(("r", 0, 0, 0), ("r", 0, 1, 1), finish={"0": STOP}), 0.0)
    assert not stream.ended
    streams.put(batch(("r", 0, 2, 1), finish={"0": STOP}), 0.0)
    assert stream.ended


async def test_strangers_are_reported_once_a_batch(streams, strangers):
    stream = streams.open("r", 1, 1)
    streams.put(batch(("r", 0, 0, 0), ("r", 0, 1, 0), ("x", 0, 0, 0), ("r", 1, 0, 0)), 0.0)
    assert sorted(strangers) == [("d", "r", 0), ("d", "x", 0)]
    assert len(await stream.read()) == 1


async def test_a_hole_is_an_error_after_what_came_before(streams):
    stream = streams.open("r", 0, 1)
    streams.put(batch(("r", 0, 0, 0), ("r", 0, 2, 0)), 0.0)
    assert len(await stream.read()) == 1
    with pytest.raises(OutputLost):
        await stream.read()


async def test_repetitions_are_dropped(streams):
    stream = streams.open("r", 0, 1)
    streams.put(batch(("r", 0, 0, 0), ("r", 0, 0, 0), ("r", 0, 1, 0)), 0.0)
    assert [row.text for row in await stream.read()] == ["0", "1"]


async def test_a_failure_row_raises_its_error(streams):
    stream = streams.open("r", 0, 1)
    streams.put(batch(("r", 0, 0, 0), failures={"0": wire.Failure(code="engine_failed", message="m")}), 0.0)
    with pytest.raises(EngineFailed):
        await stream.read()


async def test_a_failure_after_the_end_is_too_late(streams):
    stream = streams.open("r", 0, 1)
    streams.put(batch(("r", 0, 0, 0), finish={"0": STOP}), 0.0)
    stream.fail(WorkerLost("late"))
    assert len(await stream.read()) == 1
    assert await stream.read() == []


async def test_progress_is_watched_from_the_first_watch_on(streams):
    stream = streams.open("r", 0, 1)
    streams.check(100.0, 5.0)
    stream.watch(100.0)
    streams.check(105.0, 5.0)
    streams.put(batch(("r", 0, 0, 0)), 105.0)
    streams.check(110.0, 5.0)
    assert len(await stream.read()) == 1
    streams.check(110.1, 5.0)
    with pytest.raises(WorkerStalled):
        await stream.read()


async def test_what_is_not_read_is_bounded(streams):
    stream = streams.open("r", 0, 1)
    rows = [("r", 0, number, 0) for number in range(module.MAX_ROWS + 10)]
    streams.put(batch(*rows), 0.0)
    assert len(await stream.read()) == module.MAX_ROWS + 1
    with pytest.raises(Cancelled):
        await stream.read()


async def test_a_bad_row_costs_only_itself(streams):
    good = streams.open("good", 0, 1)
    streams.open("bad", 0, 1)
    broken = batch(("good", 0, 0, 0), ("bad", 0, 0, 0))
    streams.put(wire.TokenBatch(**{f: getattr(broken, f) for f in broken.__struct_fields__} | {"texts": ["0"]}), 0.0)
    assert len(await good.read()) == 1
    assert streams.bad_rows == 1


async def test_a_choice_that_nobody_asked_for(streams):
    stream = streams.open("r", 0, 1)
    streams.put(batch(("r", 0, 0, 3)), 0.0)
    with pytest.raises(Internal):
        await stream.read()


async def test_closing_an_old_attempt_leaves_the_new_one(streams):
    old = streams.open("r", 0, 1)
    streams.open("r", 1, 1)
    streams.close(old)
    assert len(streams) == 1


async def test_after_the_bus_was_away_what_has_no_row_is_tried_anew(streams):
    stream = streams.open("r", 0, 1)
    streams.bus_was_away(10.0)
    streams.check(10.1, 60.0)
    with pytest.raises(BusUnavailable) as error:
        await stream.read()
    assert error.value.retryable


async def test_after_the_bus_was_away_a_stream_goes_on_or_ends_soon(streams):
    whole, cut, ended = (streams.open(name, 0, 1) for name in ("whole", "cut", "ended"))
    streams.put(batch(("whole", 0, 0, 0), ("cut", 0, 0, 0), ("ended", 0, 0, 0)), 9.0)
    streams.bus_was_away(10.0)
    streams.put(batch(("whole", 0, 1, 0), ("cut", 0, 2, 0)), 11.0)
    streams.check(10.0 + module.OVERDUE_S + 0.1, 60.0)
    assert [row.text for row in await whole.read()] == ["0", "1"]
    for stream in (cut, ended):
        assert len(await stream.read()) == 1  # what had arrived
        with pytest.raises(BusUnavailable, match="lost"):
            await stream.read()


# ---- the sink ------------------------------------------------------------------------------------------------


class Sink:
    """Takes everything, or nothing while it is shut."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.calls = 0
        self.shut = False

    def __call__(self, rows) -> bool:
        self.calls += 1
        if not self.shut:
            self.taken += [row.text for row in rows]
        return not self.shut


async def test_the_sink_has_what_the_reader_waits_for(streams):
    stream, sink = streams.open("r", 0, 1), Sink()
    stream.sink = sink
    streams.put(batch(("r", 0, 0, 0)), 0.0)  # nobody reads yet: the reader's
    assert [row.text for row in await stream.read()] == ["0"]
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    streams.put(batch(("r", 0, 1, 0), ("r", 0, 2, 0)), 0.0)
    streams.put(batch(("r", 0, 3, 0)), 0.0)
    await asyncio.sleep(0)
    assert (sink.taken, sink.calls) == (["1", "2", "3"], 1)  # what came in one turn of the loop
    assert not reading.done()
    sink.shut = True
    streams.put(batch(("r", 0, 4, 0)), 0.0)
    await asyncio.sleep(0)
    sink.shut = False
    streams.put(batch(("r", 0, 5, 0)), 0.0)  # behind what the reader has not taken yet
    assert [row.text for row in await reading] == ["4", "5"]
    assert sink.taken == ["1", "2", "3"]
    assert stream.tokens == 6


async def test_the_end_is_the_reader_s(streams):
    stream, sink = streams.open("r", 0, 1), Sink()
    stream.sink = sink
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    streams.put(batch(("r", 0, 0, 0), ("r", 0, 1, 0), finish={"1": STOP}), 0.0)
    assert [row.text for row in await reading] == ["0", "1"]
    assert sink.calls == 0


async def test_a_hole_is_told_behind_what_came_before_it(streams):
    stream, sink = streams.open("r", 0, 1), Sink()
    stream.sink = sink
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    streams.put(batch(("r", 0, 0, 0), ("r", 0, 2, 0)), 0.0)
    assert [row.text for row in await reading] == ["0"]
    assert sink.calls == 0
    with pytest.raises(OutputLost):
        await stream.read()


async def test_a_sink_that_breaks_ends_its_own_stream(streams):
    def broken(_rows) -> bool:
        raise ValueError("no")

    stream, other, sink = streams.open("r", 0, 1), streams.open("s", 0, 1), Sink()
    stream.sink, other.sink = broken, sink
    reading, beside = asyncio.create_task(stream.read()), asyncio.create_task(other.read())
    await asyncio.sleep(0)
    streams.put(batch(("r", 0, 0, 0), ("s", 0, 0, 0)), 0.0)
    await reading
    with pytest.raises(Internal):
        await stream.read()
    assert sink.taken == ["0"]
    beside.cancel()
