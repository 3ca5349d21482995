"""A decode job: reserve, ask for prefill, accept, wait for the blocks, then stream every token from one engine."""

import asyncio
import logging
import time
from contextlib import aclosing
from functools import partial

from shared import subjects, telemetry, wire
from shared.bus import Reply, failure
from shared.errors import BatonError, BusUnavailable, Internal, KvLost, KvMemory, ResumeInexact, Timeout
from shared.kv.blocks import block_keys
from shared.kv.messages import Ready, Reserved
from shared.nats_client import Headers
from shared.worker.context import WorkerContext
from shared.worker.engine import EngineDelta, EngineRequest, KvPlan
from shared.worker.leases import leading, reserve

log = logging.getLogger(__name__)


class DecodeHandler:
    """Answers `{c}.decode.{worker}`: Accepted at once, the tokens in TokenBatches. At most `limit` jobs, then Busy."""

    def __init__(self, context: WorkerContext, limit: int) -> None:
        self._context = context
        self._limit = limit
        self._running = 0

    def __call__(self, job: wire.AnyMessage, headers: Headers, reply: Reply) -> None:
        context = self._context
        if not isinstance(job, wire.DecodeJob):
            raise TypeError(f"a decode subject got {type(job).__name__}")
        if job.replay and not context.engine.info.forces:
            raise ResumeInexact("this worker's engine cannot repeat what was sent")
        if context.draining or self._running >= self._limit:
            reason = "draining" if context.draining else "queue_full"
            reply.give_soon(wire.Busy(reason=reason, backlog=context.backlog()))
            return
        run = _Run(context, job, headers, reply)
        task = context.jobs.spawn((job.request, job.attempt), run.go(), job.gateway)
        self._running += 1
        task.add_done_callback(partial(self._ended, reply))

    def _ended(self, reply: Reply, _: object) -> None:
        self._running -= 1
        if not reply.is_given:  # a task that is cancelled before its first step runs nothing of its own
            reply.give_soon(failure(self._context.jobs.stopped()))


class _Run:
    """One job's way through reserve, wait and stream. Its lease is released on every path out."""

    def __init__(self, context: WorkerContext, job: wire.DecodeJob, headers: Headers, reply: Reply) -> None:
        self._context = context
        self._job = job
        self._parent = telemetry.extract(headers)
        self._reply = reply
        self._stream = context.batches.open(job.gateway, job.request, job.attempt)
        self._key = (job.request, job.attempt)
        self._tokens = len(job.tokens) // wire.TOKEN_BYTES
        self._lease = f"{job.request}-{job.attempt}-d-{time.monotonic_ns():x}"
        self._recomputed = 0

    async def go(self) -> None:
        """The whole job. Whatever goes wrong is answered: before Accepted there, after it in the stream."""
        context, job = self._context, self._job
        try:
            with telemetry.tracer().start_as_current_span(telemetry.DECODE_JOB, context=self._parent) as span:
                span.set_attributes(
                    {
                        "baton.worker": context.id,
                        "baton.attempt": job.attempt,
                        "gen_ai.usage.input_tokens": self._tokens,
                    }
                )
                async with asyncio.timeout(job.timeout_s):
                    await self._serve()
        except KvMemory:
            await self._fail(wire.Busy(reason=KvMemory.code, backlog=context.backlog()))
        except BatonError as error:
            await self._fail(failure(error, context.backlog()))
        except TimeoutError:
            await self._fail(failure(Timeout(f"the request took longer than {job.timeout_s:g} s")))
        except asyncio.CancelledError:
            await self._fail(failure(context.jobs.stopped()))
            raise
        except Exception:  # the job's boundary: the client gets an end whatever went wrong
            log.exception("decode job failed")
            await self._fail(failure(Internal("internal error")))

    async def _fail(self, message: wire.Message) -> None:
        if not self._reply.is_given:
            await self._reply.give(message)
        elif isinstance(message, wire.Failure):
            self._stream.failure(message)

    async def _serve(self) -> None:
        context = self._context
        try:
            slots = await self._reserve()
            if not self._job.prefill:
                held = 0 if slots is None else self._covered(leading(slots.committed))
                context.prompts.begin(self._key, self._tokens - held, time.monotonic())
            await self._accept(slots)
            context.kv_promised += self._tokens
            try:
                plan = await self._plan(slots)
            finally:
                context.kv_promised -= self._tokens
            await self._generate(plan)
        finally:
            context.prompts.drop(self._key)
            context.kv.release_soon(self._lease)

    async def _reserve(self) -> Reserved | None:
        """None: there is no store, or this model's KV cannot be handed over; the engine computes everything."""
        context, job = self._context, self._job
        attached = context.kv.attached
        if attached is None or not context.engine.info.splits:
            return None
        geometry = attached.geometry
        keys = block_keys(job.tokens, geometry.block_size, fingerprint=geometry.fingerprint, salt=job.salt)
        try:
            return await reserve(context, self._lease, job.request, keys, write=not job.prefill)
        except KvLost as error:
            log.warning("kv: serving without the store: %s", error.message)
            return None

    async def _accept(self, slots: Reserved | None) -> None:
        # Without a store nobody needs to prefill: nothing could be handed over.
        cached = self._tokens if slots is None else self._covered(leading(slots.committed))
        asked = cached < self._tokens and await self._ask_prefill()
        await self._reply.give(
            wire.Accepted(
                request=self._job.request,
                attempt=self._job.attempt,
                node=self._context.node,
                lease=self._lease,
                cached_tokens=cached,
                asked_prefill=asked,
                backlog=self._context.backlog(),
            )
        )

    async def _ask_prefill(self) -> bool:
        """On the gateway's behalf, which chose the worker and hears its answer (ADR 25). False: the gateway has to ask.

        Nobody tells whether that worker was there to hear it: the gateway watches it as one that it asked itself.
        """
        job, context = self._job, self._context
        # Refused by NATS: its users are of an older version, and what this worker says there is lost.
        if not (job.prefill and job.prefill_worker) or context.bus.refused:
            return False
        message = wire.prefill_job(job, lease=self._lease, node=context.node)
        subject = subjects.prefill(context.cluster, job.prefill_worker)
        headers = telemetry.inject(self._parent)  # the gateway's span is the parent of both jobs
        try:
            await context.bus.publish(subject, message, reply=job.prefill_reply, headers=headers)
        except BusUnavailable as error:
            log.info("prefill was not asked: %s", error.message)
            return False
        return True

    async def _plan(self, slots: Reserved | None) -> KvPlan | None:
        """Wait for the hand-off; what is not there by its deadline is recomputed, and counted."""
        job, context = self._job, self._context
        attached = context.kv.attached
        if slots is None or attached is None:
            self._recompute(self._tokens if job.prefill and context.engine.info.splits else 0)
            return None
        found: Reserved | Ready = slots
        if job.prefill and not all(slots.committed):
            try:
                found = await context.kv.wait(self._lease, timeout_s=job.handoff_s)
            except KvLost as error:
                log.warning("kv: the hand-off is lost: %s", error.message)
                self._recompute(self._tokens)
                return None
        # A prompt's log probabilities come from computing it.
        load = leading(found.committed) if job.sampling.prompt_logprobs is None else 0
        if job.prefill:
            self._recompute(self._tokens - self._covered(load))
        return KvPlan(
            arena=attached.arena,
            lease=self._lease,
            slots=found.slots,
            words=found.words,
            load=load,
            save=not job.prefill,
            write=[] if job.prefill else [not committed for committed in found.committed],
            keep=True,
            salt=job.salt.hex(),
        )

    async def _generate(self, plan: KvPlan | None) -> None:
        context, job = self._context, self._job
        started_ns, first_token, prompt_sent = time.time_ns(), False, False
        request = EngineRequest(
            id=f"{job.request}-{job.attempt}-d-{time.monotonic_ns()}",
            tokens=wire.unpack_tokens(job.tokens),
            sampling=job.sampling,
            kv=plan,
            salt=job.salt.hex(),
            priority=job.priority,
            replay=job.replay,
            trace_headers=telemetry.inject(),
        )
        progress = _Progress(job.sampling.n)
        begun_s, queues = time.monotonic(), context.engine.load().waiting > 0
        async with aclosing(context.engine.generate(request)) as deltas:
            async for delta in deltas:
                if not first_token:
                    first_token = True
                    _first_token_span(started_ns)
                    self._measure(delta, time.monotonic(), begun_s, queues=queues)
                if delta.prompt_logprobs is not None and not prompt_sent:
                    prompt_sent = True
                    await self._stream.prompt(delta.prompt_logprobs)  # every choice's are the same
                if progress.saw(delta):
                    context.kv.release_soon(self._lease)  # every choice has its prompt's KV in the engine
                self._stream.delta(delta, self._usage(progress, delta) if progress.ended else None)

    def _usage(self, progress: "_Progress", delta: EngineDelta) -> wire.DecodeUsage:
        self._context.count_prompt(self._tokens, delta)
        return wire.DecodeUsage(
            completion_tokens=progress.tokens,
            loaded_tokens=progress.loaded_tokens,
            engine_cached_tokens=max(0, progress.cached_tokens - progress.loaded_tokens),
            recomputed_tokens=self._recomputed + delta.recomputed_tokens,
        )

    def _measure(self, first: EngineDelta, now_s: float, begun_s: float, *, queues: bool) -> None:
        """What the first token cost: computing the prompt, or loading its blocks."""
        computed = self._tokens - first.cached_tokens
        if not self._job.prefill:
            self._context.prompts.done(self._key, computed, now_s)
        elif computed <= 1 and not queues:
            self._context.loads.see(self._tokens, now_s - begun_s)

    def _recompute(self, tokens: int) -> None:
        self._recomputed = tokens
        if tokens:
            self._context.metrics.recomputed_tokens.inc(tokens)

    def _covered(self, blocks: int) -> int:
        attached = self._context.kv.attached
        return min(blocks * attached.geometry.block_size, self._tokens) if attached else 0


class _Progress:
    """Which choices have started, which have ended, and what the one that found least computed of the prompt found."""

    def __init__(self, choices: int) -> None:
        self._choices = choices
        self._started: set[int] = set()
        self._ended: set[int] = set()
        self.tokens = 0
        # A later choice finds what the first has just computed: that was computed for this request.
        self.cached_tokens = 0
        self.loaded_tokens = 0

    @property
    def ended(self) -> bool:
        return len(self._ended) == self._choices

    def saw(self, delta: EngineDelta) -> bool:
        """True once: when the last choice has started."""
        self.tokens += len(delta.tokens)
        if delta.finish is not None:
            if not self._ended or delta.cached_tokens < self.cached_tokens:
                self.cached_tokens, self.loaded_tokens = delta.cached_tokens, delta.loaded_tokens
            self._ended.add(delta.choice)
        if delta.choice in self._started:
            return False
        self._started.add(delta.choice)
        return len(self._started) == self._choices


def _first_token_span(started_ns: int) -> None:
    telemetry.tracer().start_span(telemetry.DECODE_FIRST_TOKEN, start_time=started_ns).end()
