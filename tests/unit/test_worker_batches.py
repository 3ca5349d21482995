"""Rows on their way out: order, and messages that the bus takes; and what several choices say of one prompt."""

import asyncio
import itertools

from shared import wire
from shared.worker.batches import Batches
from shared.worker.decode import _Progress
from shared.worker.engine import EngineDelta

MAX_PAYLOAD = 8 * 1024 * 1024
STOP = wire.Finish(reason="stop")


class SlowBus:
    """Gives way when it publishes to gateway g, now long and now short, as a bus whose buffer is full does."""

    def __init__(self) -> None:
        self.sent: list[wire.TokenBatch] = []
        self._ticks = itertools.cycle((7, 0, 3, 1))

    async def publish(self, subject: str, message: wire.Message) -> None:
        assert isinstance(message, wire.TokenBatch)
        for _ in range(next(self._ticks) if subject.endswith(".g") else 0):
            await asyncio.sleep(0)
        self.sent.append(message)


def scored(tokens: int, alternatives: int) -> list[wire.TokenLogprob | None]:
    top = [wire.TopLogprob(token="x" * 40, token_id=100_000 + i, logprob=-0.123456789) for i in range(alternatives)]
    one = wire.TokenLogprob(token="x" * 40, token_id=1, logprob=-0.5, rank=7, top=top)
    return [None, *[one] * (tokens - 1)]


async def test_a_long_prompts_log_probabilities_go_in_pieces():
    bus = SlowBus()
    rows: list[int] = []
    stream = Batches(bus, "c", "w", backlog=wire.Backlog, sent=rows.append).open("g", "r", 0)
    positions = scored(8000, 21)
    await stream.prompt(positions)
    assert len(bus.sent) > 1
    assert rows == [1] * len(bus.sent)
    assert max(len(wire.encode(batch)) for batch in bus.sent) < MAX_PAYLOAD // 2
    assert [position for batch in bus.sent for position in batch.prompt_logprobs["0"]] == positions
    assert [sequence for batch in bus.sent for sequence in batch.sequences] == list(range(len(bus.sent)))


async def test_rows_stay_in_order_whoever_flushes():
    """Another request's sender runs beside the pieces of this one."""
    bus = SlowBus()
    batches = Batches(bus, "c", "w", backlog=wire.Backlog, sent=lambda _rows: None)
    scores, other, tokens = (batches.open(gateway, request, 0) for gateway, request in ("ga", "gb", "hc"))
    running = asyncio.create_task(batches.run())
    async with asyncio.TaskGroup() as group:
        group.create_task(scores.prompt(scored(4000, 21)))
        for index in range(50):
            other.delta(EngineDelta(choice=0, text=str(index), tokens=[index]))
            tokens.delta(EngineDelta(choice=0, text=str(index), tokens=[index]))
            await asyncio.sleep(0)
    await batches.flush()
    running.cancel()
    for request in "abc":
        rows = [
            sequence
            for batch in bus.sent
            for name, sequence in zip(batch.requests, batch.sequences, strict=True)
            if name == request
        ]
        assert rows == list(range(len(rows)))
        assert rows


async def test_steps_that_follow_at_once_share_a_batch_and_a_row():
    """The first row goes at once, what comes within the next moment goes together; ends and scores stay apart."""
    bus = SlowBus()
    batches = Batches(bus, "c", "w", backlog=wire.Backlog, sent=lambda _rows: None, apart_s=60.0)
    stream = batches.open("h", "r", 0)
    running = asyncio.create_task(batches.run())
    stream.delta(EngineDelta(choice=0, text="0", tokens=[0]))
    await asyncio.sleep(0)
    assert [batch.sequences for batch in bus.sent] == [[0]]
    for index in range(1, 4):
        stream.delta(EngineDelta(choice=0, text=str(index), tokens=[index]))
        await asyncio.sleep(0)
    stream.delta(EngineDelta(choice=1, text="x", tokens=[9]))
    stream.delta(EngineDelta(choice=0, text="4", tokens=[4]))
    stream.delta(EngineDelta(choice=0, text="5", tokens=[5], finish=STOP))
    assert len(bus.sent) == 1
    await batches.flush()
    running.cancel()
    assert bus.sent[1].sequences == [1, 2, 3, 4]
    assert bus.sent[1].texts == ["123", "x", "4", "5"]
    assert wire.unpack_tokens(bus.sent[1].tokens[0]) == [1, 2, 3]
    assert bus.sent[1].finish == {"3": STOP}


def test_what_was_cached_is_what_the_first_choice_found():
    progress = _Progress(2)
    progress.saw(EngineDelta(choice=1, text="a", tokens=[1], finish=STOP, cached_tokens=96))
    assert not progress.ended
    progress.saw(EngineDelta(choice=0, text="b", tokens=[2], finish=STOP, cached_tokens=32, loaded_tokens=32))
    assert progress.ended
    assert (progress.cached_tokens, progress.loaded_tokens, progress.tokens) == (32, 32, 2)
