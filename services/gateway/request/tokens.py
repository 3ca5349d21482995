"""The token way: a worker's batch -> the request's context -> the bytes of its events -> the client's connection.

All of it is plain functions on the loop, called by the bus; no task wakes for a token. Rows are rendered as they come
and written in the next turn of the loop, with those of other batches that have come by then, in one write.

Invariants: every row reaches its client once and in order; a row counts only if its attempt and number fit: rows of
another attempt are cancelled at their worker, a hole fails the attempt; what waits for a client is bounded; one bad
row never keeps the others of its batch from their clients.
"""

import asyncio
import logging
import time

from services.gateway.answer.render import Row, encode
from services.gateway.request import answer
from services.gateway.request.context import Deps, RequestContext, Stage, abort, fail, note
from shared import subjects, wire
from shared.errors import BatonError, BusUnavailable, Cancelled, Internal, OutputLost, WorkerStalled, from_wire

log = logging.getLogger(__name__)

MAX_UNWRITTEN_BYTES = 2 * 1024 * 1024  # for one client: who does not read is cut off rather than buffered
OVERDUE_S = 5.0  # far beyond an engine step: a stream that the bus cut off does not go on by itself
CANCEL_S = 5.0


def deliver(deps: Deps, batch: wire.TokenBatch, now: float) -> None:
    """Every row of one engine step."""
    open_, fed = deps.streams.open, deps.streams.fed
    if not fed:
        # Before a row ends its request: the task that this wakes reads the times that are taken there.
        asyncio.get_running_loop().call_soon(_write_fed, deps)
    plain = not (batch.finish or batch.usage or batch.failures or batch.logprobs or batch.prompt_logprobs)
    attempts, sequences, choices, texts, tokens = (
        batch.attempts,
        batch.sequences,
        batch.choices,
        batch.texts,
        batch.tokens,
    )
    strangers: set[tuple[str, int]] = set()
    for index, request in enumerate(batch.requests):
        try:
            ctx = open_.get(request)
            if ctx is None or ctx.attempt != attempts[index]:
                strangers.add((request, attempts[index]))
                continue
            if ctx.outcome is None or ctx.outcome.done():
                continue
            whole = ctx.under or ctx
            choice, writer = choices[index], whole.writer
            if (
                plain
                and writer is not None
                and writer.is_plain
                and sequences[index] == ctx.next_row
                and 0 <= choice < len(ctx.sent)
                and not (sent := ctx.sent[choice]).repeats
            ):
                text, ids = texts[index], tokens[index]
                sent.tokens += ids
                sent.sizes.append(len(ids))
                sent.lengths.append(len(text))
                ctx.next_row += 1
                ctx.progress_at, ctx.due_at = now, None
                if text:
                    whole.unwritten.append(writer.before[ctx.first_choice + choice] + encode(text) + writer.after)  # type: ignore[union-attr]
            else:
                fed[ctx] = _take_row(ctx, batch, index, now) or fed.get(ctx, False)
                continue
            fed[ctx] = True
        except Exception:  # a worker's bad row must not cost the other rows
            deps.streams.bad_rows += 1
            log.exception("a row of %s dropped", batch.worker)
    for request, attempt in strangers:
        cancel(deps, batch.worker, request, attempt)


def _take_row(ctx: RequestContext, batch: wire.TokenBatch, index: int, now: float) -> bool:
    """One that needs more than its text written. True: something in it is new for the client."""
    key, sequence, choice = str(index), batch.sequences[index], batch.choices[index]
    if ctx.outcome is None or ctx.outcome.done():
        return False
    if batch.failures and (failure := batch.failures.get(key)) is not None:
        fail(ctx, from_wire(failure.code, failure.message, param=failure.param, retry_after_s=failure.retry_after_s))
        return False
    if sequence != ctx.next_row:
        # NATS delivers at most once, so a repetition is a worker's slip: harmless.
        if sequence > ctx.next_row:
            lost = BusUnavailable if ctx.due_at is not None else OutputLost
            fail(ctx, lost("output was lost between worker and gateway"))
        return False
    if not 0 <= choice < len(ctx.sent):
        fail(ctx, Internal("a worker sent a choice that nobody asked for"))
        return False
    given = Row(
        choice=ctx.first_choice + choice,
        text=batch.texts[index],
        tokens=batch.tokens[index],
        finish=batch.finish.get(key) if batch.finish else None,
        logprobs=batch.logprobs.get(key) if batch.logprobs else None,
        prompt_logprobs=batch.prompt_logprobs.get(key) if batch.prompt_logprobs else None,
    )
    ctx.next_row += 1
    ctx.progress_at, ctx.due_at = now, None
    if batch.usage and (usage := batch.usage.get(key)) is not None:
        ctx.usage = usage
    if given.finish is not None:
        ctx.open_choices -= 1
    row = None
    try:
        row = ctx.sent[choice].take(given)
        if row is not None:
            if row.finish is not None:
                ctx.finish_reasons.append(row.finish.reason)
            whole = ctx.whole
            if whole.writer is not None and (data := whole.writer.rows([row])):
                whole.unwritten.append(data)
    except BatonError as error:
        fail(ctx, error)
    except Exception:  # one client's answer must not cost the others theirs
        log.exception("an answer broke on its way out")
        fail(ctx, Internal("internal error"))
    if ctx.open_choices == 0 and not ctx.outcome.done():
        ctx.outcome.set_result(None)
    return row is not None


def _write_fed(deps: Deps) -> None:
    fed, deps.streams.fed = deps.streams.fed, {}
    now = time.monotonic()
    for ctx, has_news in fed.items():
        try:
            if ctx.stage is not Stage.STREAMING and ctx.next_row:
                ctx.stages.append((Stage.STREAMING, now))
            if has_news:
                _record_time(deps, ctx, now)
            whole = ctx.under or ctx
            if ctx.open_choices or ctx.under is not None or ctx.question or ctx.prefill_question:
                write(whole, now)
            # Else its end is written with it, by the task that this has woken.
        except Exception:  # one client's answer must not cost the others theirs
            log.exception("an answer broke on its way out")
            fail(ctx, Internal("internal error"))


def _record_time(deps: Deps, ctx: RequestContext, now: float) -> None:
    """Something new for the client; while a stream is resumed there was one long gap."""
    last, ctx.last_token_at = ctx.last_token_at, now
    if last:
        deps.metrics.gap(now - last)
        return
    ctx.first_token_at = now
    note(ctx, "first_token")
    deps.metrics.first_token(now - ctx.whole.began)
    if ctx.waiting is not None and not ctx.lost:
        deps.queue.record_ttft(ctx.waiting, now)


def write(ctx: RequestContext, now: float) -> None:
    """What waits for a client, if it takes bytes now; called again when it does. `ctx`: the client's request."""
    if not (ctx.unwritten or ctx.blocked) or ctx.connection is None:
        return
    if ctx.connection.flows:
        answer.push(ctx, answer.take_unwritten(ctx), now)
        return
    data = b"".join(ctx.unwritten)
    ctx.unwritten.clear()
    ctx.blocked.append(data)
    ctx.blocked_bytes += len(data)
    if ctx.blocked_bytes > MAX_UNWRITTEN_BYTES:
        ctx.connection.cut("overrun")
        abort(ctx, Cancelled("the client reads too slowly"))


def sweep(deps: Deps, now: float) -> None:
    """Fail every attempt that makes no progress."""
    progress_s = deps.settings.progress_s
    for ctx in list(deps.streams.open.values()):
        if ctx.progress_at is not None and now - ctx.progress_at > progress_s:
            fail(ctx, WorkerStalled(f"no token for {progress_s:g} s"))
        if ctx.due_at is not None and now > ctx.due_at:
            fail(ctx, BusUnavailable("output was lost while the bus was away"))


def bus_was_away(deps: Deps, now: float) -> None:
    """What has given no row is tried anew, what has must go on soon: the last rows may have been lost."""
    for ctx in deps.streams.open.values():
        ctx.due_at = now + (OVERDUE_S if ctx.next_row else 0.0)


def cancel(deps: Deps, worker: str, request: str, attempt: int) -> None:
    """Tell a worker that nobody waits for this any more."""
    deps.background.start(_cancel(deps, worker, wire.Cancel(request=request, attempt=attempt)))


async def _cancel(deps: Deps, worker: str, message: wire.Cancel) -> None:
    subject = subjects.cancel(deps.settings.cluster, worker)
    try:
        await deps.bus.request(subject, message, wire.Done, timeout_s=CANCEL_S)
    except BatonError as error:
        # A worker that is gone has nothing to cancel; one that is deaf drops the job with its lease.
        log.info("cancel at %s unanswered: %s", worker, error.code)
