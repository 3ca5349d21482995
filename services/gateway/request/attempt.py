"""One attempt to serve a prompt: decode is asked, prefill computes, rows come (tokens.py) until all are there.

Decode asks the prefill worker that was chosen here, as soon as it has reserved; the prefill's answer comes straight to
this gateway (ADR 25). All answers are taken by plain functions called by the bus; the request's task sleeps until the
outcome is there. Invariants: on every way out the attempt takes no more rows, its questions are closed, and a Cancel is
sent to each worker that may still work for it; an attempt's number is never used twice.
"""

import asyncio
import logging
import time
from functools import partial
from heapq import nlargest
from operator import itemgetter

from services.gateway.request.context import Deps, RequestContext, Stage, enter, fail, note
from services.gateway.request.resume import repeats_itself
from services.gateway.request.tokens import cancel
from shared import spans, subjects, wire
from shared.errors import (
    BatonError,
    BusUnavailable,
    Internal,
    RequestError,
    ResumeInexact,
    ServiceError,
    Timeout,
    WorkerLost,
)

log = logging.getLogger(__name__)

MOST_HOLDERS = 4  # nodes that a prefill worker is told of
RESERVE_S = 30.0  # a worker answers Busy well before
REPORT_S = 0.5  # how long a finished stream waits for the reply that says what was cached


class WorkerBusy(Exception):
    """A worker refused; nothing was reserved and no prefill was asked. The prompt goes back in line."""

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(reason)
        self.worker = worker
        self.reason = reason


class NoPrefill(ServiceError):
    """Nobody is left to compute the prompt for this decode attempt; it is placed whole."""

    code = "no_prefill"


async def serve(ctx: RequestContext, deps: Deps) -> None:
    """With the workers of `ctx.waiting`. Raises WorkerBusy, or the error that the attempt ended with."""
    _begin(ctx, deps)
    try:
        await _ask_decode(ctx, deps)
        await _until_told(ctx)
    finally:
        _close(ctx, deps)


def _begin(ctx: RequestContext, deps: Deps) -> None:
    assert ctx.waiting is not None and ctx.waiting.placement is not None and ctx.work is not None  # noqa: S101, PT018
    placement, work = ctx.waiting.placement, ctx.work
    ctx.decode, ctx.prefill, ctx.path, ctx.reason = (
        placement.decode,
        placement.prefill,
        placement.path,
        placement.reason,
    )
    _note_placed(ctx)
    if work.replay and not (deps.fleet.forces(ctx.decode) or repeats_itself(work.sampling)):
        if deps.fleet.has_forcing():
            raise WorkerBusy(ctx.decode, "cannot_repeat")
        raise ResumeInexact("the stream was lost, and no worker there is can repeat what was sent")
    ctx.attempt += 1
    ctx.next_row, ctx.open_choices, ctx.usage = 0, work.sampling.n, None
    ctx.accepted = ctx.prefill_done = ctx.prefilled_at = ctx.progress_at = ctx.due_at = ctx.reported = None
    ctx.prefill_tried = set()
    ctx.outcome = asyncio.get_running_loop().create_future()
    deps.streams.open[ctx.id] = ctx
    enter(ctx, Stage.RESERVING)


async def _ask_decode(ctx: RequestContext, deps: Deps) -> None:
    assert ctx.work is not None and ctx.waiting is not None  # noqa: S101, PT018
    if not deps.fleet.lives(ctx.decode):
        raise WorkerLost("the decode worker was lost")
    settings, work, waiting, now = deps.settings, ctx.work, ctx.waiting, time.monotonic()
    left_s = _left_s(ctx, now)
    ctx.question = deps.bus.expect(partial(_decode_answered, deps, ctx, ctx.attempt))
    if ctx.prefill is not None:
        ctx.prefill_question = deps.bus.expect(partial(_prefill_answered, deps, ctx, ctx.attempt, ctx.prefill))
    job = wire.DecodeJob(
        request=ctx.id,
        attempt=ctx.attempt,
        gateway=settings.id,
        tokens=work.packed,
        sampling=work.sampling,
        prefill=ctx.prefill is not None,
        timeout_s=left_s,
        handoff_s=settings.handoff_s,
        replay=list(work.replay) if work.replay and deps.fleet.forces(ctx.decode) else [],
        salt=work.salt,
        prefill_worker=ctx.prefill or "",
        prefill_reply=deps.bus.reply_subject(ctx.prefill_question) if ctx.prefill_question else "",
        holders=_holders(ctx),
    )
    waiting.charges[ctx.decode].sent_at = now
    ctx.asked_until = now + min(RESERVE_S, left_s)
    subject = subjects.decode(settings.cluster, ctx.decode)
    await deps.bus.ask(subject, job, ctx.question, headers=_trace(ctx))


async def _until_told(ctx: RequestContext) -> None:
    """Until all rows have come, and, for REPORT_S, what the workers say of them."""
    assert ctx.outcome is not None  # noqa: S101
    await ctx.outcome
    if ctx.question or ctx.prefill_question:
        ctx.reported = asyncio.get_running_loop().create_future()
        await asyncio.wait({ctx.reported}, timeout=REPORT_S)


def _decode_answered(deps: Deps, ctx: RequestContext, attempt: int, reply: wire.AnyMessage | BatonError) -> None:
    if ctx.attempt != attempt or not ctx.question or ctx.waiting is None or ctx.work is None:
        return
    ctx.question, now = "", time.monotonic()
    if isinstance(reply, BatonError):
        fail(ctx, reply)
        return
    if not isinstance(reply, (wire.Accepted, wire.Busy)):
        fail(ctx, Internal(f"unexpected {type(reply).__name__} from a decode worker"))
        return
    deps.fleet.report(ctx.decode, reply.backlog, now)
    deps.fleet.settle(ctx.waiting.charges[ctx.decode])
    if isinstance(reply, wire.Busy):
        _forget_prefill(deps, ctx)
        fail(ctx, WorkerBusy(ctx.decode, reply.reason))
        return
    ctx.accepted = reply
    if ctx.stage is Stage.RESERVING:
        enter(ctx, Stage.HANDOFF)
    if ctx.prefill is None:
        ctx.progress_at = ctx.progress_at or now
    elif reply.cached_tokens >= len(ctx.work.tokens):
        # The decode node holds every block already.
        _forget_prefill(deps, ctx)
        deps.queue.release(ctx.waiting)
        ctx.prefill, ctx.reason, ctx.progress_at = None, "cached", ctx.progress_at or now
    else:
        ctx.handoff_until = now + deps.settings.handoff_s
        if ctx.prefill_done is not None:
            pass  # its answer was faster
        elif not ctx.prefill_question:
            _start_move(deps, ctx, ctx.prefill)
        elif not reply.asked_prefill:  # a worker of an older version
            _ask_prefill(deps, ctx, ctx.prefill)
        elif not deps.fleet.lives(ctx.prefill):
            _prefill_answered(deps, ctx, attempt, ctx.prefill, WorkerLost("the prefill worker was lost"))
        else:
            ctx.waiting.charges[ctx.prefill].sent_at = now
    _tell_reported(ctx)


def _prefill_answered(
    deps: Deps, ctx: RequestContext, attempt: int, worker: str, reply: wire.AnyMessage | BatonError
) -> None:
    if ctx.attempt != attempt or not ctx.prefill_question or ctx.waiting is None:
        return
    deps.bus.forget(ctx.prefill_question)
    ctx.prefill_question, now = "", time.monotonic()
    if (charge := ctx.waiting.charges.get(worker)) is not None:
        deps.fleet.settle(charge)
    if isinstance(reply, (wire.PrefillDone, wire.Busy)):
        deps.fleet.report(worker, reply.backlog, now)
    deps.queue.pump()
    if isinstance(reply, wire.PrefillDone):
        ctx.prefill_done, ctx.prefilled_at = reply, now
        ctx.progress_at = max(now, ctx.progress_at or now)
    elif isinstance(reply, RequestError):
        fail(ctx, reply)
    else:
        if not isinstance(reply, wire.Busy):
            error = reply if isinstance(reply, BatonError) else Internal(f"unexpected {type(reply).__name__}")
            log.info("request %s: prefill at %s ended with %s", ctx.id, worker, error.code)
            # It may have answered with an error, or not at all: then it must not go on for nobody.
            ctx.prefill_tried.add(worker)
            cancel(deps, worker, ctx.id, attempt)
            _count_retry(deps, ctx, worker, error.code)
        if ctx.accepted is not None:  # else its lease is not known yet
            _start_move(deps, ctx, worker)
    _tell_reported(ctx)


def _start_move(deps: Deps, ctx: RequestContext, last: str) -> None:
    if ctx.outcome is not None and not ctx.outcome.done():
        ctx.moving = deps.background.start(
            _move_prefill(deps, ctx, last), on_error=lambda _: fail(ctx, Internal("internal error"))
        )


async def _move_prefill(deps: Deps, ctx: RequestContext, last: str) -> None:
    """The same job to somebody else with room, while there is time; one that was only busy may be asked again."""
    busy = {last} - ctx.prefill_tried
    while (left_s := ctx.handoff_until - time.monotonic()) > 0:
        if (other := deps.queue.other_prefiller(ctx.prefill_tried | busy, ctx.decode)) is not None:
            _ask_prefill(deps, ctx, other)
            return
        if not deps.fleet.has("prefill", besides=ctx.prefill_tried | {ctx.decode}):
            if ctx.next_row == 0:  # else decode has given the blocks up and computed the prompt itself
                fail(ctx, NoPrefill("no prefill worker is left"))
            return
        try:
            async with asyncio.timeout(left_s):
                await deps.fleet.change()
        except TimeoutError:
            break
        busy.clear()
    # Decode stops waiting for the blocks at the same time and computes the prompt itself.
    ctx.progress_at = max(time.monotonic(), ctx.progress_at or 0.0)


def _ask_prefill(deps: Deps, ctx: RequestContext, worker: str) -> None:
    """From here: the first one is asked by decode."""
    assert ctx.accepted is not None and ctx.work is not None and ctx.waiting is not None  # noqa: S101, PT018
    now = time.monotonic()
    charge = ctx.waiting.charges.get(worker)
    if charge is None or not charge.open:
        charge = deps.fleet.charge(worker, jobs=1, tokens=len(ctx.work.tokens), now=now)
        ctx.waiting.charges[worker] = charge
    charge.sent_at = now
    ctx.prefill = worker
    if ctx.prefill_question:
        deps.bus.forget(ctx.prefill_question)
    ctx.prefill_question = deps.bus.expect(partial(_prefill_answered, deps, ctx, ctx.attempt, worker))
    job = wire.PrefillJob(
        request=ctx.id,
        attempt=ctx.attempt,
        gateway=deps.settings.id,
        tokens=ctx.work.packed,
        lease=ctx.accepted.lease,
        node=ctx.accepted.node,
        timeout_s=_left_s(ctx, now),
        salt=ctx.work.salt,
        holders=_holders(ctx),
    )
    deps.background.start(_send_prefill(deps, ctx, worker, job))


async def _send_prefill(deps: Deps, ctx: RequestContext, worker: str, job: wire.PrefillJob) -> None:
    try:
        subject = subjects.prefill(deps.settings.cluster, worker)
        await deps.bus.ask(subject, job, ctx.prefill_question, headers=_trace(ctx))
    except BusUnavailable as error:
        _prefill_answered(deps, ctx, job.attempt, worker, error)


# ---- ends from outside -----------------------------------------------------------------------------------------


def worker_lost(deps: Deps, worker: str) -> None:
    """Whoever waits for it is told at once."""
    for ctx in list(deps.streams.open.values()):
        if ctx.decode == worker:
            fail(ctx, WorkerLost("the decode worker was lost"))
        elif ctx.prefill == worker and ctx.accepted is not None:
            _prefill_answered(deps, ctx, ctx.attempt, worker, WorkerLost("the prefill worker was lost"))


def bus_was_away(deps: Deps) -> None:
    """Decode's answers are due at once: question or answer may be lost. Prefill's outcome is seen in another way."""
    for ctx in list(deps.streams.open.values()):
        if ctx.question:
            fail(ctx, BusUnavailable("the bus was away while a worker was asked"))


def sweep(deps: Deps, now: float) -> None:
    for ctx in list(deps.streams.open.values()):
        if ctx.question and now > ctx.asked_until:
            fail(ctx, Timeout("a decode worker did not answer in time"))


def _close(ctx: RequestContext, deps: Deps) -> None:
    if deps.streams.open.get(ctx.id) is ctx:
        del deps.streams.open[ctx.id]
    if ctx.moving is not None:
        ctx.moving.cancel()
        ctx.moving = None
    if ctx.outcome is None:
        return
    is_busy = ctx.outcome.done() and not ctx.outcome.cancelled() and isinstance(ctx.outcome.exception(), WorkerBusy)
    if ctx.question:
        deps.bus.forget(ctx.question)
        ctx.question = ""
    if ctx.prefill_question:
        _forget_prefill(deps, ctx)
        if ctx.prefill is not None:
            cancel(deps, ctx.prefill, ctx.id, ctx.attempt)
    if ctx.open_choices and not is_busy:
        cancel(deps, ctx.decode, ctx.id, ctx.attempt)
    ctx.outcome = None


# ---- small parts -------------------------------------------------------------------------------------------------


def _forget_prefill(deps: Deps, ctx: RequestContext) -> None:
    if ctx.prefill_question:
        deps.bus.forget(ctx.prefill_question)
        ctx.prefill_question = ""


def _tell_reported(ctx: RequestContext) -> None:
    if ctx.reported is not None and not (ctx.question or ctx.prefill_question or ctx.reported.done()):
        ctx.reported.set_result(None)


def _count_retry(deps: Deps, ctx: RequestContext, worker: str, reason: str) -> None:
    deps.metrics.retried("prefill")
    note(ctx, "retry", phase="prefill", worker=worker, reason=reason)
    ctx.retries += 1


def _note_placed(ctx: RequestContext) -> None:
    assert ctx.waiting is not None and ctx.waiting.placement is not None  # noqa: S101, PT018
    placement = ctx.waiting.placement
    predicted_s = placement.predicted_ttft_s
    more = {} if predicted_s is None else {"predicted_ttft_ms": round(predicted_s * 1000, 1)}
    note(
        ctx,
        "placed",
        path=placement.path,
        reason=placement.reason,
        prefill=placement.prefill or "",
        decode=placement.decode,
        **more,
    )


def _holders(ctx: RequestContext) -> dict[str, int]:
    hits = ctx.waiting.wish.hits if ctx.waiting is not None and ctx.prefill is not None else None
    return dict(nlargest(MOST_HOLDERS, hits.items(), key=itemgetter(1))) if hits else {}


def _left_s(ctx: RequestContext, now: float) -> float:
    return max(0.1, ctx.whole.deadline - now)


def _trace(ctx: RequestContext) -> dict[str, str] | None:
    span = ctx.whole.span
    return spans.headers(span) if span is not None else None
