"""One process that drives load: starts every request when it is due, never when an earlier one has been answered.

Invariants: in an open loop nothing that a server does moves an intended time; every request that was begun becomes one
row; a driver that is told to stop gives what it has.
"""

import asyncio
import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import msgspec

from loadtest.load.alarm import Pace
from loadtest.load.answer import Answer, Outcome, text_and_tokens
from loadtest.load.bodies import Bodies, Dialogue
from loadtest.load.client import Attempts, Client, Endpoint, Limits, Reply
from loadtest.load.conversation import Conversation, Source, fitted
from loadtest.load.expected import Claim, Expected, wrong
from loadtest.load.prompts import mixed
from loadtest.load.records import Row, Share, Try

PROGRESS_S = 1.0
INTERRUPTED = "interrupted"  # the code of what was in flight when the run was told to end


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one driver of `parts` has to do. `arrivals_s`: of the whole run; None: a closed loop of `users` here."""

    part: int
    parts: int
    source: Source
    bodies: Bodies
    endpoint: Endpoint
    limits: Limits
    seed: int
    room_tokens: int | None  # prompt and output together; None: not known
    chat_room_tokens: int | None  # less, because chat lengths are estimates
    arrivals_s: Sequence[float] | None
    conversations: int | None  # of the whole run; None: until the time is over
    users: int = 0
    seconds: float | None = None  # no turn begins later
    leave_share: float = 0.0
    verify_share: float = 0.0
    expected: Expected | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Since the start, but `tokens` and `ttfts_s` since the last one."""

    sent: int
    done: int
    shed: int
    failed: int
    tokens: int
    ttfts_s: list[float]
    comparing: bool = False  # the load is over; texts are compared with the expected ones


class Driver:
    """`tell` gets a Progress every second."""

    def __init__(self, job: Job, tell: Callable[[Progress], None]) -> None:
        self._job, self._tell = job, tell
        self._rows: list[Row] = []
        self._offsets = array("f")
        self._claims: list[Claim] = []
        self._outcomes: Counter[str] = Counter()
        self._sent = self._tokens = self._clipped = 0
        self._ttfts_s: list[float] = []
        self._start_s = 0.0
        self._client = Client(job.endpoint, job.limits, random.Random(mixed(job.seed, 1, job.part)))

    async def run(self, stop: asyncio.Event) -> Share:
        cpu_s = time.process_time()
        async with self._client:
            self._start_s = time.monotonic()
            load = asyncio.ensure_future(self._closed() if self._job.arrivals_s is None else self._open())
            stopped = asyncio.ensure_future(stop.wait())
            reporting = asyncio.ensure_future(self._report())
            try:
                await asyncio.wait({load, stopped}, return_when=asyncio.FIRST_COMPLETED)
                load.cancel()  # nothing happens to what is done
                await asyncio.wait({load})
            finally:
                stopped.cancel()
                reporting.cancel()
        if not load.cancelled():
            load.result()
        cpu_s = time.process_time() - cpu_s
        if self._claims:
            self._tell(self._progress(comparing=True))
            self._verify()
        return Share(
            rows=self._rows,
            offsets=self._offsets.tobytes(),
            cpu_s=cpu_s,
            clipped=self._clipped,
            no_connection=self._client.no_connection,
            verified=len(self._claims),
        )

    async def _open(self) -> None:
        pace = Pace()
        try:
            async with asyncio.TaskGroup() as tasks:
                for index in self._indices():
                    dialogue = self._dialogue(index)
                    body = dialogue.say()  # made before it is due
                    intended_s = self._start_s + self._arrival_s(index)
                    await pace.until(intended_s)
                    tasks.create_task(self._converse(index, dialogue, body, intended_s))
        finally:
            pace.close()

    async def _closed(self) -> None:
        indices = self._indices()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._job.users):
                tasks.create_task(self._user(indices))

    async def _user(self, indices: Iterator[int]) -> None:
        """Asks again and again, each time after the answer and some thought."""
        due_s = self._start_s
        for index in indices:
            dialogue = self._dialogue(index)
            if due_s > self._start_s:
                due_s += dialogue.turn.think_s
            if self._over(due_s):
                return
            body = dialogue.say()
            await _until(due_s)
            await self._converse(index, dialogue, body, max(due_s, self._start_s))
            due_s = time.monotonic()

    async def _converse(self, index: int, dialogue: Dialogue, body: bytes, intended_s: float) -> None:
        """Turn after turn; one that is not answered ends it."""
        number = 0
        while True:
            turn_key = mixed(self._job.seed, 2, index, number)
            answer = await self._turn(dialogue, body, intended_s, turn_key)
            if answer is None or answer.outcome != Outcome.OK or not dialogue.goes_on:
                return
            dialogue.heard(*text_and_tokens(answer.kept))
            intended_s = answer.end_s + dialogue.turn.think_s
            if self._over(intended_s):
                return
            number += 1
            body = dialogue.say()
            await _until(intended_s)

    async def _turn(self, dialogue: Dialogue, body: bytes, intended_s: float, key: int) -> Answer | None:
        job = self._job
        rng = random.Random(key) if job.leave_share or job.verify_share else None
        turn_tokens = dialogue.said.output_tokens
        leave_after = rng.randrange(turn_tokens) if rng is not None and rng.random() < job.leave_share else None
        verify = rng is not None and job.expected is not None and rng.random() < job.verify_share
        self._sent += 1
        attempts = Attempts()
        try:
            reply = await self._client.post(
                dialogue.path, body, attempts, keep=verify or dialogue.goes_on, leave_after=leave_after
            )
        except asyncio.CancelledError:
            self._interrupted(attempts, intended_s)
            raise
        answer = reply.answer
        if verify and answer.outcome == Outcome.OK:
            text, _ = text_and_tokens(answer.kept)
            self._claims.append(Claim(row=len(self._rows), prompt=dialogue.tokens, max_tokens=turn_tokens, text=text))
        row = _row(reply, attempts.failed, intended_s, self._start_s)
        self._keep(row, [at_s - intended_s for at_s in answer.times])
        return answer

    def _interrupted(self, attempts: Attempts, intended_s: float) -> None:
        """The run ends while this request is in flight, or waits to be sent again."""
        failed, answer = attempts.failed, attempts.now
        if answer is None:
            answer = Answer()
        answer.outcome, answer.code, answer.end_s = Outcome.LEFT, INTERRUPTED, time.monotonic()
        first_sent_s = failed[0].sent_s if failed else answer.sent_s
        row = _row(Reply(answer, first_sent_s, len(failed) + 1), failed, intended_s, self._start_s)
        self._keep(row, [at_s - intended_s for at_s in answer.times])

    def _keep(self, row: Row, offsets: Sequence[float]) -> None:
        self._rows.append(row)
        self._offsets.extend(offsets)
        self._outcomes[row.outcome] += 1
        self._tokens += row.output_tokens or row.events
        if row.ttft_s is not None:
            self._ttfts_s.append(row.ttft_s)

    def _dialogue(self, index: int) -> Dialogue:
        job = self._job
        conversation: Conversation = job.source.conversation(index)
        room = job.chat_room_tokens if conversation.chat else job.room_tokens
        if room is not None:
            whole = conversation
            conversation = fitted(whole, room)
            self._clipped += conversation is not whole
        return job.bodies.dialogue(conversation)

    def _indices(self) -> Iterator[int]:
        """Every `parts`-th conversation of the run is this driver's."""
        number = self._job.part
        while self._job.conversations is None or number < self._job.conversations:
            yield number
            number += self._job.parts

    def _arrival_s(self, index: int) -> float:
        assert self._job.arrivals_s is not None  # noqa: S101 - an open loop
        return self._job.arrivals_s[index]

    def _over(self, at_s: float) -> bool:
        return self._job.seconds is not None and at_s - self._start_s >= self._job.seconds

    def _verify(self) -> None:
        if self._job.expected is not None:
            for row in wrong(self._claims, self._job.expected):
                self._rows[row].outcome = Outcome.WRONG

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            self._tell(self._progress())

    def _progress(self, *, comparing: bool = False) -> Progress:
        tokens, ttfts = self._tokens, self._ttfts_s
        self._tokens, self._ttfts_s = 0, []
        done, shed, left = (self._outcomes[name] for name in (Outcome.OK, Outcome.SHED, Outcome.LEFT))
        return Progress(
            sent=self._sent,
            done=done + left,
            shed=shed,
            failed=len(self._rows) - done - shed - left,
            tokens=tokens,
            ttfts_s=ttfts,
            comparing=comparing,
        )


def _row(reply: Reply, tries: list[Try], intended_s: float, start_s: float) -> Row:
    answer, receipt = reply.answer, reply.answer.receipt
    return Row(
        intended_s=intended_s - start_s,
        sent_s=reply.first_sent_s - start_s if reply.first_sent_s else None,
        last_sent_s=answer.sent_s - start_s if answer.sent_s else None,
        ttft_s=answer.times[0] - intended_s if answer.times else None,
        end_s=answer.end_s - start_s,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.output_tokens,
        cached_tokens=answer.cached_tokens,
        outcome=answer.outcome or Outcome.ERROR,
        status=answer.status,
        code=answer.code,
        attempts=reply.attempts,
        path=(receipt.path or "") if receipt else "",
        retries=receipt.retries if receipt else None,
        stages_s={name: ms / 1e3 for name, ms in receipt.stages_ms.items() if ms is not None} if receipt else None,
        predicted_ttft_s=_seconds(receipt.predicted_ttft_ms) if receipt else None,
        actual_ttft_s=_seconds(receipt.actual_ttft_ms) if receipt else None,
        tries=_since(tries, start_s),
        events=len(answer.times),
    )


def _since(tries: list[Try], start_s: float) -> list[Try]:
    return [msgspec.structs.replace(one, sent_s=one.sent_s - start_s, end_s=one.end_s - start_s) for one in tries]


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


async def _until(at_s: float) -> None:
    wait_s = at_s - time.monotonic()
    if wait_s > 0:
        await asyncio.sleep(wait_s)
