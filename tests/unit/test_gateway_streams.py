"""From a worker's batch to a client's bytes: order, holes, strangers, limits."""

import asyncio
from types import SimpleNamespace

import pytest

from services.gateway.answer.render import EventWriter, Form, PromptShown
from services.gateway.request import tokens
from services.gateway.request.context import RequestContext, Stage, Streams, fail
from services.gateway.request.resume import Sent
from shared import wire
from shared.errors import BusUnavailable, EngineFailed, Internal, OutputLost, WorkerLost, WorkerStalled


class Connection:
    """What a client has read."""

    def __init__(self) -> None:
        self.data = b""
        self.flows = True
        self.cuts: list[str] = []

    def start_stream(self, _status, _headers, data) -> None:
        self.data += data

    def push(self, data) -> None:
        self.data += data

    def cut(self, reason) -> None:
        self.cuts.append(reason)

    @property
    def texts(self) -> list[str]:
        return [part.split(b'"')[0].decode() for part in self.data.split(b'"text":"')[1:]]


class Open:
    """A gateway's open streams, and those whose rows nobody awaits."""

    def __init__(self) -> None:
        self.strangers: list[tuple[str, str, int]] = []
        self.gaps: list[float] = []
        self.deps = SimpleNamespace(
            streams=Streams(),
            metrics=SimpleNamespace(gap=self.gaps.append, first_token=lambda _: None),
            settings=SimpleNamespace(progress_s=5.0),
        )

    def open(self, name: str = "r", attempt: int = 0, n: int = 1) -> RequestContext:
        form = Form(
            chat=False,
            id=name,
            created=0,
            model="m",
            n=n,
            top_logprobs=None,
            prompt_logprobs=None,
            include_usage=False,
            return_token_ids=False,
            service_tier=None,
            prompts=[PromptShown(tokens=[1])],
            prompt_only=False,
        )
        ctx = self.deps.streams.open[name] = RequestContext(
            id=name,
            attempt=attempt,
            open_choices=n,
            form=form,
            streamed=True,
            writer=EventWriter(form),
            sent=[Sent() for _ in range(n)],
            connection=Connection(),
            outcome=asyncio.get_running_loop().create_future(),
            stages=[(Stage.HANDOFF, 0.0)],
        )
        return ctx

    def put(self, *rows, now: float = 0.0, **columns) -> None:
        tokens.deliver(self.deps, batch(*rows, **columns), now)


async def flushed() -> None:
    """One turn of the loop."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@pytest.fixture
def streams(monkeypatch):
    streams = Open()
    monkeypatch.setattr(tokens, "cancel", lambda _, *what: streams.strangers.append(what))
    return streams


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


async def test_rows_are_written_in_order_and_end(streams):
    ctx = streams.open()
    streams.put(("r", 0, 0, 0), ("r", 0, 1, 0))
    await flushed()
    assert ctx.connection.texts == ["0", "1"]
    streams.put(("r", 0, 2, 0))
    streams.put(("r", 0, 3, 0))
    await flushed()
    assert (ctx.connection.texts, ctx.stage, len(streams.gaps)) == (["0", "1", "2", "3"], Stage.STREAMING, 1)
    streams.put(("r", 0, 4, 0), finish={"0": STOP}, usage={"0": wire.DecodeUsage(completion_tokens=5)})
    await ctx.outcome
    assert (ctx.usage.completion_tokens, ctx.generated, ctx.finish_reasons) == (5, 5, ["stop"])


async def test_choices_end_together(streams):
    ctx = streams.open(n=2)
    streams.put(("r", 0, 0, 0), ("r", 0, 1, 1), finish={"0": STOP})
    assert not ctx.outcome.done()
    streams.put(("r", 0, 2, 1), finish={"0": STOP})
    assert ctx.outcome.done()


async def test_strangers_are_cancelled_once_a_batch(streams):
    ctx = streams.open(attempt=1)
    streams.put(("r", 0, 0, 0), ("r", 0, 1, 0), ("x", 0, 0, 0), ("r", 1, 0, 0))
    await flushed()
    assert sorted(streams.strangers) == [("d", "r", 0), ("d", "x", 0)]
    assert ctx.generated == 1


@pytest.mark.parametrize("first", [0, 3], ids=["at once", "later"])
async def test_a_hole_is_an_error_after_what_came_before(streams, first):
    ctx = streams.open()
    streams.put(*(("r", 0, number, 0) for number in range(first + 1)), ("r", 0, first + 2, 0))
    await flushed()
    assert len(ctx.connection.texts) == first + 1
    with pytest.raises(OutputLost):
        await ctx.outcome


async def test_repetitions_are_dropped(streams):
    ctx = streams.open()
    streams.put(("r", 0, 0, 0), ("r", 0, 0, 0), ("r", 0, 1, 0), ("r", 0, 1, 0))
    await flushed()
    assert ctx.connection.texts == ["0", "1"]


async def test_a_failure_row_raises_its_error(streams):
    ctx = streams.open()
    streams.put(("r", 0, 0, 0), failures={"0": wire.Failure(code="engine_failed", message="m")})
    with pytest.raises(EngineFailed):
        await ctx.outcome


async def test_a_failure_after_the_end_is_too_late(streams):
    ctx = streams.open()
    streams.put(("r", 0, 0, 0), finish={"0": STOP})
    fail(ctx, WorkerLost("late"))
    await ctx.outcome


async def test_nothing_is_taken_after_a_failure(streams):
    ctx = streams.open()
    streams.put(("r", 0, 0, 0))
    fail(ctx, WorkerLost("lost"))
    streams.put(("r", 0, 1, 0), ("r", 0, 2, 0))
    await flushed()
    assert ctx.connection.texts == ["0"]
    ctx.outcome.exception()


async def test_progress_is_watched_once_it_is_due(streams):
    ctx = streams.open()
    tokens.sweep(streams.deps, 100.0)
    ctx.progress_at = 100.0
    tokens.sweep(streams.deps, 105.0)
    streams.put(("r", 0, 0, 0), now=105.0)
    tokens.sweep(streams.deps, 110.0)
    assert not ctx.outcome.done()
    tokens.sweep(streams.deps, 110.1)
    with pytest.raises(WorkerStalled):
        await ctx.outcome


async def test_what_a_client_does_not_take_waits_and_is_bounded(streams, monkeypatch):
    monkeypatch.setattr(tokens, "MAX_UNWRITTEN_BYTES", 1000)
    ctx = streams.open()
    ctx.connection.flows = False
    streams.put(*(("r", 0, number, 0) for number in range(3)))
    await flushed()
    assert (ctx.connection.data, ctx.connection.cuts) == (b"", [])
    ctx.connection.flows = True
    tokens.write(ctx, 0.0)
    assert ctx.connection.texts == ["0", "1", "2"]
    ctx.connection.flows = False
    streams.put(*(("r", 0, number, 0) for number in range(3, 20)))
    await flushed()
    assert ctx.connection.cuts == ["overrun"]


async def test_a_bad_row_costs_only_itself(streams):
    good, bad = streams.open("good"), streams.open("bad")
    broken = batch(("good", 0, 0, 0), ("bad", 0, 0, 0))
    fields = {f: getattr(broken, f) for f in broken.__struct_fields__}
    tokens.deliver(streams.deps, wire.TokenBatch(**fields | {"texts": ["0"]}), 0.0)
    assert (good.generated, bad.generated, streams.deps.streams.bad_rows) == (1, 0, 1)


@pytest.mark.parametrize("choice", [1, 3, -1])
async def test_a_choice_that_nobody_asked_for(streams, choice):
    ctx = streams.open()
    streams.put(("r", 0, 0, 0), ("r", 0, 1, choice))
    with pytest.raises(Internal):
        await ctx.outcome


async def test_a_writer_that_breaks_ends_its_own_stream(streams):
    ctx, other = streams.open("r"), streams.open("s")
    ctx.writer.rows = lambda _: 1 / 0
    streams.put(("r", 0, 0, 0), ("s", 0, 0, 0))
    await flushed()
    with pytest.raises(Internal):
        await ctx.outcome
    assert other.connection.texts == ["0"]


async def test_after_the_bus_was_away_what_has_no_row_is_tried_anew(streams):
    ctx = streams.open()
    tokens.bus_was_away(streams.deps, 10.0)
    tokens.sweep(streams.deps, 10.1)
    with pytest.raises(BusUnavailable) as error:
        await ctx.outcome
    assert error.value.retryable


async def test_after_the_bus_was_away_a_stream_goes_on_or_ends_soon(streams):
    streams.deps.settings.progress_s = 60.0
    whole, cut, ended = (streams.open(name) for name in ("whole", "cut", "ended"))
    streams.put(("whole", 0, 0, 0), ("cut", 0, 0, 0), ("ended", 0, 0, 0), now=9.0)
    tokens.bus_was_away(streams.deps, 10.0)
    streams.put(("whole", 0, 1, 0), ("cut", 0, 2, 0), now=11.0)
    tokens.sweep(streams.deps, 10.0 + tokens.OVERDUE_S + 0.1)
    assert not whole.outcome.done()
    for ctx in (cut, ended):
        assert ctx.generated == 1  # what had arrived
        with pytest.raises(BusUnavailable, match="lost"):
            await ctx.outcome
