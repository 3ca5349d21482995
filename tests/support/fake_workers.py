"""Prefill and decode workers that keep the wire contract over a real NATS and have no engine.

A fake decode worker emits " 0", " 1", … (token ids 100, 101, …) for as many tokens as were asked for, and goes on with
" 5" after a prompt that ends with the ids of " 0" to " 4". What goes wrong
is written into its `Script`. The blocks of a hand-off are an entry in `Handoffs`, which stands for the stores.
"""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.trace import get_current_span

from shared import subjects, telemetry, wire
from shared.bus import Bus
from shared.errors import BatonError

WAIT_S = 10.0


@dataclass
class Handoffs:
    """Leases whose blocks have been committed."""

    _committed: dict[str, asyncio.Event] = field(default_factory=dict)

    def lease(self, lease: str) -> asyncio.Event:
        """Set it and decode begins: the blocks are there, or it has given them up."""
        return self._committed.setdefault(lease, asyncio.Event())


@dataclass
class Script:
    """How a fake misbehaves. Counts go down with use."""

    busy: int = 0  # answer Busy so often
    busy_reason: str = "queue_full"
    refuse: BatonError | None = None  # answer every job with this
    hang: bool = False  # take the job and never answer
    silent: bool = False  # reserve, ask prefill, and never say so
    is_old: bool = False  # of a version that leaves asking prefill to the gateway
    deaf: bool = False  # go on after a cancel, as one does that has not seen it yet
    says_first: int = 0  # begin with this number
    stall_after: int | None = None  # rows after which nothing more comes
    pause_after: tuple[int, asyncio.Event] | None = None  # rows after which it waits for the event
    hole_after: int | None = None  # rows after which one is left out
    held: frozenset[int] = frozenset()  # steps whose text comes with the next one's, as half a character does
    wrong_attempt: bool = False  # send a stranger's row before each own one
    fail_after: tuple[int, wire.Failure] | None = None
    cached_tokens: int = 0
    usage: wire.DecodeUsage | None = None


class FakeWorker:
    """Start with `start`; `die` is a crash: its connection closes and nothing is answered any more."""

    def __init__(
        self, url: str, handoffs: Handoffs, *, worker: str, role: str, cluster: str = "test", **beat: object
    ) -> None:
        self.id = worker
        self.script = Script()
        self.jobs: list[wire.DecodeJob | wire.PrefillJob] = []
        self.cancels: list[tuple[str, int]] = []
        self.trace_ids: list[int] = []
        self._url = url
        self._handoffs = handoffs
        self._cluster = cluster
        self._role = role
        self._seen = asyncio.Condition()
        self._running: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.beat = wire.Heartbeat(
            role=role,
            id=worker,
            incarnation=uuid.uuid4().hex,
            takes=[role],
            node="node-0",
            max_model_len=512,
            max_running=8,
            max_waiting=4,
            **{"forces": True, **beat},
        )

    async def start(self) -> "FakeWorker":
        self._bus = await Bus.connect(self._url, self.id)
        c = self._cluster
        handler, subject = (
            (self._decode, subjects.decode) if self._role == "decode" else (self._prefill, subjects.prefill)
        )
        await self._bus.serve(subject(c, self.id), handler)
        await self._bus.serve(subjects.cancel(c, self.id), self._cancel)
        await self._bus.serve(subjects.ping(c, self.id), self._ping)
        await self._bus.flush()
        self._spawn(self._beats())
        return self

    async def die(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._bus.close()

    async def until(self, condition: Callable[["FakeWorker"], bool]) -> None:
        """Wait until something was seen here."""
        async with asyncio.timeout(WAIT_S), self._seen:
            await self._seen.wait_for(lambda: condition(self))

    def _spawn(self, work) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _note(self) -> None:
        async with self._seen:
            self._seen.notify_all()

    async def _beats(self) -> None:
        while True:
            await self._bus.publish(subjects.beat(self._cluster, self._role, self.id), self.beat)
            await asyncio.sleep(0.1)

    async def _ping(self, message: wire.AnyMessage, _: Context) -> wire.Message:
        return wire.Pong(id=self.id)

    async def _cancel(self, message: wire.AnyMessage, _: Context) -> wire.Message:
        assert isinstance(message, wire.Cancel)
        key = (message.request, message.attempt)
        self.cancels.append(key)
        if key in self._running and not self.script.deaf:
            self._running.pop(key).cancel()
        await self._note()
        return wire.Done()

    async def _arrived(self, job, context: Context) -> wire.Message | None:
        self.jobs.append(job)
        self.trace_ids.append(get_current_span(context).get_span_context().trace_id)
        await self._note()
        if self.script.hang:
            await asyncio.Event().wait()
        if self.script.refuse is not None:
            raise self.script.refuse
        if self.script.busy > 0:
            self.script.busy -= 1
            return wire.Busy(reason=self.script.busy_reason)
        return None

    async def _prefill(self, job: wire.AnyMessage, context: Context) -> wire.Message:
        assert isinstance(job, wire.PrefillJob)
        if (refusal := await self._arrived(job, context)) is not None:
            return refusal
        self._handoffs.lease(job.lease).set()
        return wire.PrefillDone(request=job.request, attempt=job.attempt, cached_tokens=self.script.cached_tokens)

    async def _decode(self, job: wire.AnyMessage, context: Context) -> wire.Message:
        assert isinstance(job, wire.DecodeJob)
        if (refusal := await self._arrived(job, context)) is not None:
            return refusal
        lease = f"{self.id}:{job.request}:{job.attempt}"
        if not job.prefill or self.script.cached_tokens * 4 >= len(job.tokens):
            self._handoffs.lease(lease).set()
        self._running[job.request, job.attempt] = self._spawn(self._emit(job, lease))
        asks = job.prefill_worker and not self.script.is_old and not self._handoffs.lease(lease).is_set()
        if asks:
            await self._ask_prefill(job, lease, context)
        if self.script.silent:
            await asyncio.Event().wait()
        return wire.Accepted(
            asked_prefill=bool(asks),
            request=job.request,
            attempt=job.attempt,
            node="node-0",
            lease=lease,
            cached_tokens=self.script.cached_tokens,
            backlog=wire.Backlog(running=len(self._running)),
        )

    async def _ask_prefill(self, job: wire.DecodeJob, lease: str, context: Context) -> None:
        message = wire.prefill_job(job, lease=lease, node="node-0")
        subject = subjects.prefill(self._cluster, job.prefill_worker)
        await self._bus.publish(subject, message, reply=job.prefill_reply, headers=telemetry.inject(context))

    async def _emit(self, job: wire.DecodeJob, lease: str) -> None:
        await self._handoffs.lease(lease).wait()
        n, script, sequence = job.sampling.n, self.script, 0
        first = script.says_first or answered(wire.unpack_tokens(job.tokens))
        if job.sampling.prompt_logprobs is not None:
            for piece in prompt_pieces(wire.unpack_tokens(job.tokens)):
                await self._send(self._batch(job, -1, [0], [sequence], prompt_logprobs={"0": piece}))
                sequence += 1
        for step in range(job.sampling.max_tokens):
            last = step == job.sampling.max_tokens - 1
            if script.stall_after is not None and step >= script.stall_after:
                await asyncio.Event().wait()
            if script.pause_after is not None and step == script.pause_after[0]:
                await script.pause_after[1].wait()
            if script.fail_after is not None and step >= script.fail_after[0]:
                await self._send(self._batch(job, first + step, [0], [sequence], failures={"0": script.fail_after[1]}))
                return
            if script.wrong_attempt:
                await self._send(self._batch(job, first + step, [0], [sequence], attempts=[job.attempt + 7]))
            if script.hole_after == step:
                sequence += 1
            rows = list(range(n))
            finish = {str(row): wire.Finish(reason="length") for row in rows} if last else {}
            usage = {str(n - 1): script.usage or wire.DecodeUsage(completion_tokens=job.sampling.max_tokens * n)}
            await self._send(
                self._batch(
                    job,
                    first + step,
                    rows,
                    [sequence + row for row in rows],
                    finish=finish,
                    usage=usage if last else {},
                )
            )
            sequence += n
        self._running.pop((job.request, job.attempt), None)

    async def _send(self, batch: tuple[str, wire.TokenBatch]) -> None:
        await self._bus.publish(subjects.gateway(self._cluster, batch[0]), batch[1])

    def _batch(
        self, job: wire.DecodeJob, step: int, rows: list[int], sequences: list[int], **columns
    ) -> tuple[str, wire.TokenBatch]:
        columns.setdefault("attempts", [job.attempt] * len(rows))
        if job.sampling.logprobs is not None and step >= 0:
            top = [
                wire.TopLogprob(token=f" {step}", token_id=100 + step, logprob=-0.5),
                wire.TopLogprob(token=f" {step}x", token_id=9, logprob=-1.5),
            ]
            one = wire.TokenLogprob(token=f" {step}", token_id=100 + step, logprob=-0.5, top=top)
            columns["logprobs"] = {str(row): [one] for row in rows}
        batch = wire.TokenBatch(
            worker=self.id,
            requests=[job.request] * len(rows),
            sequences=sequences,
            choices=rows,
            texts=[self._text(step)] * len(rows),
            tokens=[wire.pack_tokens([100 + step] if step >= 0 else [])] * len(rows),
            backlog=wire.Backlog(running=len(self._running)),
            **columns,
        )
        return job.gateway, batch

    def _text(self, step: int) -> str:
        if step < 0 or step in self.script.held:
            return ""
        return (f" {step - 1}" if step - 1 in self.script.held else "") + f" {step}"


def answered(prompt: list[int]) -> int:
    """How much of a fake's output the prompt ends with."""
    return max(n for n in range(len(prompt) + 1) if prompt[len(prompt) - n :] == list(range(100, 100 + n)))


def prompt_pieces(tokens: list[int]) -> list[list[wire.TokenLogprob | None]]:
    """In two messages, as a worker sends a long one. Token i is "<i>", third in rank behind 8 and 9."""
    scores: list[wire.TokenLogprob | None] = [None]
    for token in tokens[1:]:
        better = [wire.TopLogprob(token=f"<{other}>", token_id=other, logprob=-0.5) for other in (8, 9)]
        own = wire.TopLogprob(token=f"<{token}>", token_id=token, logprob=-2.0)
        scores.append(
            wire.TokenLogprob(token=own.token, token_id=token, logprob=own.logprob, rank=3, top=[*better, own])
        )
    return [scores[:1], scores[1:]]


async def announce_loss(url: str, *workers: str, cluster: str = "test") -> None:
    """What a node's store says when a worker's socket has closed."""
    bus = await Bus.connect(url, "kv")
    beat = wire.Heartbeat(role="kv", id="kv-0", incarnation="1", lost=list(workers))
    await bus.publish(subjects.beat(cluster, "kv", "kv-0"), beat)
    await bus.flush()
    await bus.close()
