"""The end of a request: its answer's last bytes, and what is said of it: figures, one line in the log, its trace.

All of it is worked out here, once, from what the context holds. Never a word of what the request was about.
"""

import logging
import time

import msgspec
from opentelemetry import trace

from services.gateway.answer.receipt import Receipt
from services.gateway.answer.render import DONE, Collector, EventWriter, Usage
from services.gateway.observe import genai
from services.gateway.observe.metrics import outcome
from services.gateway.observe.traces.sampling import Ending
from services.gateway.request import answer
from services.gateway.request.context import Deps, RequestContext, Stage
from services.gateway.request.receipt import queued_s, receipt
from shared import spans, telemetry, wire
from shared.errors import BatonError, Cancelled, Refused
from shared.telemetry import log_fields

log = logging.getLogger(__name__)

SPANS = {Stage.ADMISSION: telemetry.GATEWAY_ADMISSION, Stage.QUEUED: telemetry.GATEWAY_QUEUE}


def usage(ctx: RequestContext) -> Usage:
    """Of one prompt whose rows have all come."""
    assert ctx.original is not None  # noqa: S101
    decode = ctx.usage or wire.DecodeUsage()
    prompt, generated = len(ctx.original.tokens), ctx.generated
    if ctx.path == "split" and ctx.prefill is not None:
        # What prefill found is what nobody computed; blocks that got lost on the way were computed after all.
        cached = (ctx.prefill_done.cached_tokens if ctx.prefill_done else 0) - decode.recomputed_tokens
    elif ctx.path == "split":
        cached = (ctx.accepted.cached_tokens if ctx.accepted else 0) - decode.recomputed_tokens
    else:
        cached = decode.loaded_tokens + decode.engine_cached_tokens
    # The last prompt token is always computed: it gives the first token's logits.
    ctx.cached_tokens = min(max(0, cached), prompt - 1)
    is_resumed = ctx.work is not ctx.original
    completion = generated if is_resumed else decode.completion_tokens or generated
    return Usage(prompt=prompt, completion=completion, cached=ctx.cached_tokens)


def end(ctx: RequestContext, deps: Deps, usages: list[Usage]) -> None:
    """All rows are there: count them, and end the answer."""
    assert ctx.form is not None  # noqa: S101
    total = ctx.total = Usage.total(usages, answered=not ctx.form.prompt_only)
    if ctx.bill is not None:
        ctx.bill.usage = total
    prompts = ctx.prompts or [ctx]
    first_token_at = min(one.first_token_at for one in prompts)
    decoding_s = time.monotonic() - first_token_at
    deps.metrics.served(total, decoding_s, ctx.client.tenant)
    choices = sum(len(one.finish_reasons) for one in prompts)
    target = deps.settings.target(ctx.tier)
    each = total.completion / max(1, choices)
    if first_token_at - ctx.began <= target.ttft_s and decoding_s <= target.itl_s * max(1.0, each - 1):
        deps.metrics.within_target(ctx.tier)
    shown = ctx.shown = receipt(ctx)
    _leave(ctx, deps)
    if isinstance(ctx.writer, EventWriter):
        answer.end_stream(ctx, ctx.writer.usage(total) + shown.comment() + DONE)
    elif isinstance(ctx.writer, Collector):
        answer.whole(ctx, 200, [], ctx.writer.body(total), shown)


def close(ctx: RequestContext, deps: Deps, error: BatonError | None) -> None:
    """On every way out: give back what it holds; tell the client of an error; tell all others what has happened."""
    _leave(ctx, deps)
    now = time.monotonic()
    shown = ctx.shown or receipt(ctx)
    prompts = ctx.prompts or [ctx]
    if ctx.bill is not None:
        began, generated = any(one.attempt >= 0 for one in prompts), sum(one.generated for one in prompts)
        deps.access.settle(ctx.bill, error, began=began, generated=generated)
    if error is not None:
        if isinstance(error, Refused):
            # All that is known of a request that was let go: how long it waited in line.
            shown.stages_ms = {"queue": round(max(queued_s(one, now) for one in prompts) * 1000, 1)}
        if isinstance(error, Cancelled):
            open_ = next((one for one in prompts if one.stage is not Stage.DONE), ctx)
            deps.metrics.cancelled(open_.stage.value)
        else:
            answer.tell_error(ctx, error, shown)
    duration_s = now - ctx.began
    deps.metrics.ended(error, ctx.tier, duration_s)
    if deps.settings.request_log == "on":
        _log(ctx, deps, shown, error, duration_s)
    if ctx.span is not None:
        _trace(ctx, deps, ctx.span, shown, error=error, duration_s=duration_s)
    # Each of these holds the other, and the prompt, until the collector comes.
    for one in ctx.prompts:
        one.under = None
    ctx.prompts = []
    if error is not None:
        error.__traceback__ = error.__context__ = error.__cause__ = None


def _leave(ctx: RequestContext, deps: Deps) -> None:
    """Perhaps another request fits now. Twice is once."""
    ctx.task = None
    deps.running.body_bytes -= ctx.held_bytes
    ctx.held_bytes = 0
    if ctx in deps.running.requests:
        if ctx.connection is not None:
            ctx.connection.leave()
        del deps.running.requests[ctx]
        deps.running.prompts -= len(ctx.prompts) or 1
        if not deps.running.requests:
            deps.running.idle.set()
        deps.queue.pump()


def _finish_spans(
    ctx: RequestContext, root: spans.Span, prompts: list[RequestContext], error: BatonError | None
) -> None:
    root.set_attributes({"baton.tenant": ctx.client.tenant, "baton.request_id": ctx.request_id})
    limits = [one.original.sampling.max_tokens for one in prompts if one.original is not None]
    if ctx.form is not None and limits:
        root.set_attributes(
            genai.request(
                chat=ctx.form.chat,
                model=ctx.form.model,
                max_tokens=0 if ctx.form.prompt_only else max(limits),
                response_id=ctx.response_id,
            )
        )
        root.set_attribute("baton.tier", ctx.tier)
    if ctx.total is not None:
        root.set_attributes(genai.response(ctx.total, [reason for one in prompts for reason in one.finish_reasons]))
    if isinstance(error, Refused):
        root.add_event("shed", {"reason": error.code})
    if error is not None:
        root.set_attributes(genai.error(error.code))
        root.set_status(trace.StatusCode.ERROR, error.code)
    offset_ns, recorder = time.time_ns() - time.monotonic_ns(), telemetry.recorder()
    now = time.monotonic()
    # Of several prompts each waits in line, and they are admitted together: until their own stages begin.
    admitted_at = ctx.prompts[0].stages[1][1] if ctx.prompts and len(ctx.prompts[0].stages) > 1 else now
    for one in (ctx, *ctx.prompts):
        ends = [at for _, at in one.stages[1:]] + [admitted_at if one is ctx else now]
        for (stage, began), ended in zip(one.stages, ends, strict=True):
            if stage in SPANS and (stage is Stage.QUEUED or one is ctx):
                recorder.add(SPANS[stage], root, int(began * 1e9) + offset_ns, int(ended * 1e9) + offset_ns)
    root.end()


def _log(ctx: RequestContext, deps: Deps, shown: Receipt, error: BatonError | None, duration_s: float) -> None:
    prompts = ctx.prompts or [ctx]
    fields: dict[str, object] = {
        "request_id": ctx.request_id,
        "response_id": ctx.response_id,
        "trace_id": f"{ctx.span.trace_id:032x}" if ctx.span is not None else "",
        "outcome": outcome(error),
        "reason": error.code if error is not None else shown.reason,
        "tenant": ctx.client.tenant,
        "tier": ctx.tier,
        "model": deps.model,
        "path": shown.path,
        "prefill": shown.prefill,
        "decode": shown.decode,
        "prompt_tokens": _prompt_tokens(prompts),
        "cached_tokens": shown.cached_tokens,
        "completion_tokens": ctx.total.completion if ctx.total is not None else sum(one.generated for one in prompts),
        "ttft_ms": shown.actual_ttft_ms,
        "duration_ms": round(duration_s * 1000, 1),
        "retries": shown.retries,
        "stages_ms": shown.stages_ms,
    }
    log_fields(log, "request", {key: value for key, value in fields.items() if value not in (None, "")})


def _prompt_tokens(prompts: list[RequestContext]) -> int:
    return sum(len(one.original.tokens) for one in prompts if one.original is not None)


def _trace(
    ctx: RequestContext,
    deps: Deps,
    span: spans.Span,
    shown: Receipt,
    *,
    error: BatonError | None,
    duration_s: float,
) -> None:
    prompts = ctx.prompts or [ctx]
    target = deps.settings.target(ctx.tier)
    gaps_s = [(one.last_token_at - one.first_token_at) / max(1, one.generated - 1) for one in prompts if one.waiting]
    ending = Ending(
        outcome=outcome(error),
        duration_s=duration_s,
        ttft_s=None if shown.actual_ttft_ms is None else shown.actual_ttft_ms / 1000,
        gap_s=max(gaps_s, default=None),
        target_ttft_s=target.ttft_s,
        target_itl_s=target.itl_s,
        retries=shown.retries,
    )
    kept = deps.traces.decide(ending, sampled=span.sampled)
    if kept is None and not telemetry.recorder().watchers:
        deps.traces.drop(span)  # which most are: their spans are never made
        return
    _finish_spans(ctx, span, prompts, error)
    if kept is None:
        deps.traces.drop(span)
        return
    deps.traces.keep(
        span,
        ending,
        lambda: msgspec.to_builtins(shown),  # kept for long: nothing else of the request may hang on it
        kept=kept,
        request_id=ctx.request_id,
        tier=ctx.tier,
        tenant=ctx.client.tenant,
        path=shown.path,
    )
