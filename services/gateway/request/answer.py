"""How an answer gets to its client: a stream of events, or one body; and errors, before it and within it."""

import time

import msgspec

from services.gateway.answer import errors
from services.gateway.answer.receipt import HEADER, Receipt
from services.gateway.answer.render import WAITING, error_event
from services.gateway.request.context import RequestContext
from services.gateway.request.receipt import receipt
from shared.errors import BatonError

EVENTS: errors.Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
JSON = (b"content-type", b"application/json")


def push(ctx: RequestContext, data: bytes, now: float) -> None:
    """The next piece of a stream, its head before the first one. `ctx`: the client's request."""
    if ctx.connection is None:
        return
    ctx.written_at = now
    if ctx.started:
        ctx.connection.push(data)
    else:
        ctx.started = True
        ctx.connection.start_stream(200, [*EVENTS, *_headers(ctx, receipt(ctx))], data)


def take_unwritten(ctx: RequestContext) -> bytes:
    data = b"".join([*ctx.blocked, *ctx.unwritten])
    ctx.unwritten.clear()
    ctx.blocked.clear()
    ctx.blocked_bytes = 0
    return data


def keep_alive(ctx: RequestContext, now: float) -> None:
    """A client that has heard nothing for long: a comment on its stream, and an ear for its leaving."""
    if ctx.connection is None:
        return
    ctx.written_at = now
    ctx.connection.keep_listening()
    if ctx.streamed and ctx.connection.flows:
        push(ctx, WAITING, now)


def end_stream(ctx: RequestContext, data: bytes) -> None:
    """`data` is the last of it, behind what waits."""
    if ctx.connection is not None:
        data = take_unwritten(ctx) + data
        if not ctx.started:
            push(ctx, data, time.monotonic())
            data = b""
        ctx.connection.end_stream(data)


def whole(ctx: RequestContext, status: int, headers: errors.Headers, body: bytes, shown: Receipt) -> None:
    if ctx.connection is not None:
        ctx.started = True
        ctx.connection.answer(status, [JSON, *headers, *_headers(ctx, shown)], body)


def tell_error(ctx: RequestContext, error: BatonError, shown: Receipt) -> None:
    """Before the first byte a status, after it one event: never a faked finish, and no [DONE]."""
    if ctx.started:
        end_stream(ctx, error_event(error))
    else:
        status, headers, body = errors.render(error)
        whole(ctx, status, headers, body, shown)


def _headers(ctx: RequestContext, shown: Receipt) -> errors.Headers:
    headers = [(b"x-request-id", ctx.request_id.encode()), *ctx.answer_headers]
    if shown.path is not None or shown.stages_ms is not None:
        headers.append((HEADER, msgspec.json.encode(shown)))
    return headers
