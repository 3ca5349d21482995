"""A prefill job: compute a prompt's blocks and leave them committed in the node's store."""

import asyncio
import logging
import time
from contextlib import aclosing
from functools import partial

from opentelemetry.context import Context

from shared import telemetry, wire
from shared.bus import Reply, failure
from shared.errors import BatonError, Internal, KvLost, KvMemory, Timeout
from shared.kv.blocks import block_keys
from shared.nats_client import Headers
from shared.worker.context import WorkerContext
from shared.worker.engine import EngineRequest, KvPlan
from shared.worker.jobs import Key
from shared.worker.leases import held, leading
from shared.worker.pulling import Pulled

log = logging.getLogger(__name__)

# Prefill needs none of the request's sampling parameters: its token is thrown away, decode samples every one.
_ONE_TOKEN = wire.Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
OFFER_S = 10.0


class PrefillHandler:
    """Answers `{c}.prefill.{worker}`. At most `limit` jobs at once, then Busy."""

    def __init__(self, context: WorkerContext, limit: int) -> None:
        self._context = context
        self._limit = limit
        self._running = 0

    def __call__(self, job: wire.AnyMessage, headers: Headers, reply: Reply) -> None:
        context = self._context
        if not isinstance(job, wire.PrefillJob):
            raise TypeError(f"a prefill subject got {type(job).__name__}")
        if context.draining or self._running >= self._limit:
            reason = "draining" if context.draining else "queue_full"
            reply.give_soon(wire.Busy(reason=reason, backlog=context.backlog()))
            return
        key = (job.request, job.attempt)
        task = context.jobs.spawn(key, self._run(job, telemetry.extract(headers), reply), job.gateway)
        self._running += 1
        context.prompts.begin(key, len(job.tokens) // wire.TOKEN_BYTES, time.monotonic())
        task.add_done_callback(partial(self._ended, key, reply))

    def _ended(self, key: Key, reply: Reply, _: object) -> None:
        self._running -= 1
        self._context.prompts.drop(key)
        if not reply.is_given:  # a task that is cancelled before its first step runs nothing of its own
            reply.give_soon(failure(self._context.jobs.stopped()))

    async def _run(self, job: wire.PrefillJob, parent: Context, reply: Reply) -> None:
        """The whole job. Whatever goes wrong is the answer."""
        context = self._context
        try:
            with telemetry.tracer().start_as_current_span(telemetry.PREFILL_JOB, context=parent) as span:
                span.set_attributes(
                    {
                        "baton.worker": context.id,
                        "baton.attempt": job.attempt,
                        "gen_ai.usage.input_tokens": len(job.tokens) // wire.TOKEN_BYTES,
                    }
                )
                async with asyncio.timeout(job.timeout_s):
                    answer: wire.Message = await self._compute(job)
        except KvMemory:
            answer = wire.Busy(reason=KvMemory.code, backlog=context.backlog())
        except BatonError as error:
            answer = failure(error)
        except TimeoutError:
            answer = failure(Timeout(f"prefill took longer than {job.timeout_s:g} s"))
        except asyncio.CancelledError:
            await reply.give(failure(context.jobs.stopped()))
            raise
        except Exception:  # the job's boundary: the asker gets an answer whatever went wrong
            log.exception("prefill job failed")
            answer = failure(Internal("internal error"))
        await reply.give(answer)

    async def _compute(self, job: wire.PrefillJob) -> wire.Message:
        context = self._context
        attached = context.kv.attached
        if attached is None:
            raise KvLost("this node's KV store is away")
        geometry = attached.geometry
        keys = block_keys(job.tokens, geometry.block_size, fingerprint=geometry.fingerprint, salt=job.salt)
        pulled = await self._pull(job, keys, geometry.block_size)
        try:
            where = {"for_node": job.node, "for_lease": job.lease}
            async with held(context, job.request, job.attempt, keys, **where) as (lease, slots):
                if pulled is not None:
                    pulled.release()
                plan = KvPlan(
                    arena=attached.arena,
                    lease=lease,
                    slots=slots.slots,
                    words=slots.words,
                    load=leading(slots.committed),
                    save=True,
                    write=[not committed for committed in slots.committed],
                )
                cached = min(plan.load * geometry.block_size, len(job.tokens) // wire.TOKEN_BYTES)
                if plan.load < len(keys):
                    cached = await self._engine(job, plan, cached, pulled.tokens if pulled else 0)
                # On a device the last blocks are on their way out still; another node's store may not have said yet
                # that it takes them. Both have shorter deadlines of their own.
                ready = await context.kv.wait(lease, timeout_s=OFFER_S)
                if not ready.complete:
                    raise KvLost("the prompt was computed, but not all of its blocks reached the store")
        finally:
            if pulled is not None:
                pulled.release()
        context.prompts.drop((job.request, job.attempt))  # else the reply would count it still
        return wire.PrefillDone(
            request=job.request, attempt=job.attempt, cached_tokens=cached, backlog=context.backlog()
        )

    async def _pull(self, job: wire.PrefillJob, keys: list[bytes], block_size: int) -> Pulled | None:
        pulling = self._context.pulling
        if pulling is None or not job.holders:
            return None
        return await pulling.pull(job.request, keys, block_size, job.holders, self._context.prompts)

    async def _engine(self, job: wire.PrefillJob, plan: KvPlan, held: int, pulled: int) -> int:
        """Returns the prompt tokens that were not computed.

        `held`: those that the store has, `pulled`: of these, for this job from another node.
        """
        context = self._context
        key, tokens = (job.request, job.attempt), wire.unpack_tokens(job.tokens)
        request = EngineRequest(
            id=f"{job.request}-{job.attempt}-p-{time.monotonic_ns()}",
            tokens=tokens,
            sampling=_ONE_TOKEN,
            kv=plan,
            salt=job.salt.hex(),
            priority=job.priority,
            trace_headers=telemetry.inject(),
        )
        cached = 0
        context.prompts.begin(key, len(tokens) - held, time.monotonic())  # again: waiting for slots was no work
        async with aclosing(context.engine.generate(request)) as deltas:
            async for delta in deltas:
                cached = max(cached, delta.cached_tokens)
                context.count_prompt(len(tokens), delta, pulled)
        context.prompts.done(key, len(tokens) - cached, time.monotonic())
        return cached
