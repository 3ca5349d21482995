"""A request's way through the gateway: read `run` from top to bottom beside design section 2.

Each of its prompts goes the middle of the way by itself. Invariants: one coroutine owns the request, and its prompts
end with it; one prompt that fails ends all; the client gets one answer or one error; once the client has seen a token,
its prompt goes on after the last one that it has, or fails (resume.py says which), and is never begun again.
"""

import asyncio
import logging
import time

import msgspec

from services.gateway.access.access import Wanted
from services.gateway.answer.render import Collector, EventWriter, Usage
from services.gateway.request import attempt, finish
from services.gateway.request.attempt import NoPrefill, WorkerBusy
from services.gateway.request.context import Deps, RequestContext, Stage, enter, note
from services.gateway.request.resume import Sent, goes_on_by_prompt, work_after
from services.gateway.scheduling.admission import admit as check_room
from shared.errors import BatonError, Refused, Timeout

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4  # decode jobs lost without a new token in between
MAX_BUSY = 3  # refusals by workers that looked free; a stream that has begun goes by the queue's time alone


async def run(ctx: RequestContext, deps: Deps) -> None:
    """From a request that has been read to the end of its answer. Raises the error that ends it."""
    prompts = ctx.prompts or [ctx]
    await admit(ctx, deps)
    if len(prompts) == 1:
        usages = [await serve_prompt(ctx, deps)]
    else:
        usages = await _together(prompts, deps)
    finish.end(ctx, deps, usages)


async def admit(ctx: RequestContext, deps: Deps) -> None:
    """Take what it may use from its key's quota, and see that there is room for it. Raises the refusal."""
    enter(ctx, Stage.ADMISSION)
    settings, running, form = deps.settings, deps.running, ctx.form
    prompts = ctx.prompts or [ctx]
    tokens = sum(len(one.original.tokens) for one in prompts if one.original)
    completion = sum(one.original.sampling.max_tokens * one.original.sampling.n for one in prompts if one.original)
    wanted = Wanted(
        prompt=tokens, completion=0 if form and form.prompt_only else completion, bounded=ctx.limit is not None
    )
    ctx.bill = await deps.access.charge(ctx.client, deps.model, wanted, ctx.answer_headers)
    more = len(prompts) - 1
    check_room(
        draining=running.draining,
        connected=deps.bus.connected,
        decode_alive=deps.fleet.has("decode"),
        requests=running.prompts - 1 + more,  # the one that asks is among them
        max_requests=settings.max_requests,
        queued_tokens=deps.queue.tokens + tokens,
        max_queued_tokens=settings.max_queued_tokens,
        retry_after_s=lambda: deps.queue.retry_after_s(tokens),
    )
    running.prompts += more
    if form is not None:
        ctx.writer = EventWriter(form) if ctx.streamed else Collector(form)
    for one in ctx.prompts:
        enter(one, Stage.ADMISSION)


async def serve_prompt(ctx: RequestContext, deps: Deps) -> Usage:
    """Place it, ask its workers, pass its tokens on; again elsewhere while that is right. Raises what ends it."""
    assert ctx.waiting is not None and ctx.original is not None  # noqa: S101, PT018
    ctx.work = ctx.original
    ctx.sent = [Sent() for _ in range(ctx.original.sampling.n)]
    lost: BatonError | None = None
    ctx.waiting.entered = time.monotonic()
    while True:
        enter(ctx, Stage.QUEUED)
        try:
            await deps.queue.take(ctx.waiting, ctx.last_busy)
        except Refused as refused:
            raise (lost if lost is not None and _has_begun(ctx) else refused) from None
        try:
            await attempt.serve(ctx, deps)
            break
        except WorkerBusy as busy:
            _back_in_line(ctx, deps, busy)
        except BatonError as error:
            _try_again(ctx, deps, error)
            lost = error
        finally:
            deps.queue.release(ctx.waiting)
    enter(ctx, Stage.DONE)
    usage = finish.usage(ctx)
    deps.queue.answered(ctx.waiting.tier, ctx.waiting.tenant, usage.completion)
    return usage


def _back_in_line(ctx: RequestContext, deps: Deps, busy: WorkerBusy) -> None:
    """With the old deadline, not to that worker before its next beat, and not for ever."""
    assert ctx.waiting is not None  # noqa: S101
    ctx.busy += 1
    ctx.last_busy = busy.reason
    note(ctx, "busy", worker=busy.worker, reason=busy.reason)
    ctx.waiting.avoid[busy.worker] = deps.fleet.beats(busy.worker)
    if ctx.busy > MAX_BUSY and not _has_begun(ctx):
        raise deps.queue.refusal(busy.reason)


def _try_again(ctx: RequestContext, deps: Deps, error: BatonError) -> None:
    """Place it once more with the next attempt, before all others, or raise what ends it."""
    assert ctx.waiting is not None and ctx.original is not None  # noqa: S101, PT018
    waiting, worker = ctx.waiting, ctx.decode
    before = ctx.stage is not Stage.STREAMING and isinstance(error, (NoPrefill, Timeout))
    if not (before or error.retryable):
        raise error
    told = ctx.generated
    ctx.lost = 1 if told > ctx.told_at_loss else ctx.lost + 1
    ctx.told_at_loss = told
    if ctx.lost >= MAX_ATTEMPTS:
        raise error
    ctx.retries += 1
    if isinstance(error, NoPrefill):
        waiting.wish = msgspec.structs.replace(waiting.wish, whole="prefill_failed")
        phase = "prefill"
    else:
        waiting.avoid[worker] = deps.fleet.beats(worker)
        phase = "resume" if _has_begun(ctx) else "decode"
    deps.metrics.retried(phase)
    note(ctx, "resume" if phase == "resume" else "retry", phase=phase, worker=worker, reason=error.code)
    if _has_begun(ctx):
        by_prompt, forces = goes_on_by_prompt(ctx.original.sampling), deps.fleet.has_forcing()
        prompts = [sent.resume(by_prompt=by_prompt, forces=forces) for sent in ctx.sent]
        ctx.work = work_after(ctx.original, prompts[0], [sent.replay for sent in ctx.sent])
        waiting.wish = msgspec.structs.replace(waiting.wish, tokens=len(ctx.work.tokens))
    waiting.tokens, waiting.urgent, waiting.entered = waiting.wish.uncached, True, time.monotonic()
    log.info("request %s: attempt %d ended with %s", ctx.id, ctx.attempt, error.code)


def _has_begun(ctx: RequestContext) -> bool:
    """The client has something of it."""
    return any(sent.has_begun for sent in ctx.sent)


async def _together(prompts: list[RequestContext], deps: Deps) -> list[Usage]:
    """All of them side by side. Raises what the first failed with, and cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(serve_prompt(one, deps)) for one in prompts]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
