"""A request on one of the two hot routes, from its first byte: read, check, tokenise; then request/pipeline.py.

Invariants: the body is bounded, alone and over all clients; whatever happens inside becomes one answer, a span and
figures (request/finish.py); a client that leaves is noticed from the first byte to the last.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from services.gateway.answer.connection import CONNECTION
from services.gateway.answer.render import Form, PromptShown
from services.gateway.http import pieces, reading
from services.gateway.http.requests import ChatBody, CompletionBody, RequestBody
from services.gateway.http.tokenizer import ChatTokenizer
from services.gateway.request import finish, pipeline
from services.gateway.request.context import Deps, RequestContext, Stage, abort
from services.gateway.request.resume import Work
from services.gateway.request.tokens import write
from services.gateway.scheduling.admission import fit, fit_text
from services.gateway.scheduling.placement import Wish
from services.gateway.scheduling.queue import Waiting
from shared import wire
from shared.errors import (
    BatonError,
    BodyTooLarge,
    Cancelled,
    Internal,
    InvalidRequest,
    QueueFull,
    UnsupportedMedia,
)

log = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

JSON = re.compile(rb"application/(?:[\w.-]+\+)?json(?:\s*;.*)?", re.IGNORECASE)
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
RETRY_AFTER_S = 1.0


async def handle(
    deps: Deps, tokenizer: ChatTokenizer, kind: type[RequestBody], scope: Message, receive: Receive
) -> None:
    """The boundary: one request, from its head to the last word that is said of it."""
    ctx = begin(deps, kind, scope)
    error: BatonError | None = None
    with deps.traces.request(ctx.headers.get(b"traceparent", b"").decode("latin-1")) as ctx.span:
        try:
            # No name holds what the client sent: its answer may take long.
            await tokenise(ctx, deps, tokenizer, await check(ctx, deps, kind, await read(ctx, deps, receive)))
            await pipeline.run(ctx, deps)
        except BatonError as failed:
            error = failed
        except asyncio.CancelledError:
            if ctx.verdict is None or ctx.task is None:
                error = Cancelled("the server is stopping")
                raise
            ctx.task.uncancel()
            error = ctx.verdict
        except Exception:  # the boundary: the client gets an answer, the log the reason
            log.exception("request %s failed", ctx.id)
            error = Internal("internal error")
        finally:
            finish.close(ctx, deps, error)


def begin(deps: Deps, kind: type[RequestBody], scope: Message) -> RequestContext:
    id_, now = secrets.token_hex(16), time.monotonic()
    ctx = RequestContext(
        id=id_,
        request_id=id_,
        response_id=("chatcmpl-" if kind is ChatBody else "cmpl-") + id_,
        began=now,
        deadline=now + deps.settings.body_s,
        headers=dict(scope["headers"]),
        connection=scope[CONNECTION],
        can_stream=scope["http_version"] != "1.0",
        task=asyncio.current_task(),
        stages=[(Stage.READING, now)],
    )
    given = ctx.headers.get(b"x-request-id", b"").decode("latin-1")
    if REQUEST_ID.fullmatch(given):
        ctx.request_id = given
    deps.running.requests[ctx] = None
    deps.running.prompts += 1
    deps.running.idle.clear()
    return ctx


# ---- read ------------------------------------------------------------------------------------------------------


async def read(ctx: RequestContext, deps: Deps, receive: Receive) -> bytes:
    """The body. Raises a RequestError, QueueFull, or Cancelled when the client leaves while sending."""
    ctx.client = deps.access.client(ctx.headers.get(b"authorization", b""))
    max_bytes, running = deps.settings.max_body_bytes, deps.running
    _check_headers(ctx, max_bytes)
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the client left")
        part: bytes = message.get("body", b"")
        if ctx.held_bytes + len(part) > max_bytes:
            raise _too_large(max_bytes)
        if running.body_bytes + len(part) > deps.settings.max_bodies_bytes:
            raise QueueFull("too many large bodies are arriving", retry_after_s=RETRY_AFTER_S)
        running.body_bytes += len(part)
        ctx.held_bytes += len(part)
        parts.append(part)
        if not message.get("more_body", False):
            break
    ctx.is_read, ctx.deadline = True, ctx.began + deps.settings.request_s
    if ctx.connection is not None and not ctx.connection.attend(
        partial(abort, ctx, Cancelled("the client left")), lambda: write(ctx, time.monotonic())
    ):
        raise Cancelled("the client left")
    return b"".join(parts)


def _check_headers(ctx: RequestContext, max_bytes: int) -> None:
    headers = ctx.headers
    if headers.get(b"x-request-id") and ctx.request_id is ctx.id:
        raise InvalidRequest("x-request-id: up to 128 letters, digits and . _ : -", param="x-request-id")
    if not JSON.fullmatch(headers.get(b"content-type", b"application/json")):
        raise UnsupportedMedia("content-type: must be application/json", param="content-type")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UnsupportedMedia("content-encoding: bodies are taken as they are only", param="content-encoding")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > max_bytes:  # the parser lets only digits through
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body may have up to {max_bytes} bytes")


# ---- check -----------------------------------------------------------------------------------------------------


async def check(ctx: RequestContext, deps: Deps, kind: type[RequestBody], data: bytes) -> RequestBody:
    """What the client asks for, and that its key may ask for it. Raises a RequestError that names the parameter."""
    settings = deps.settings
    body = await pieces.read(kind, data, model=deps.model, max_n=settings.max_n, max_prompts=settings.max_prompts)
    deps.running.body_bytes -= ctx.held_bytes
    ctx.held_bytes = 0
    ctx.tier, ctx.streamed, ctx.limit = body.tier, body.streamed, body.limit()
    ctx.client.check(model=body.model, tier=body.tier)
    if ctx.streamed and not ctx.can_stream:
        raise InvalidRequest("stream: needs HTTP/1.1", param="stream")
    return body


# ---- tokenise --------------------------------------------------------------------------------------------------


async def tokenise(ctx: RequestContext, deps: Deps, tokenizer: ChatTokenizer, body: RequestBody) -> None:
    """Every prompt as token ids that fit the model, with what is known of where their KV is."""
    shown = await _prompts(deps, tokenizer, body)
    named = {param: prompt.tokens for param, prompt in shown.items()}
    limits = [_limit(deps, body, tokens, param) for param, tokens in named.items()]
    reading.check_token_ids(body, named, tokenizer.vocabulary)
    ctx.form = Form(
        chat=isinstance(body, ChatBody),
        id=ctx.response_id,
        created=int(time.time()),
        model=body.model,
        n=body.n or 1,
        top_logprobs=body.logprob_count(),
        prompt_logprobs=body.prompt_logprobs,
        include_usage=body.include_usage,
        return_token_ids=bool(body.return_token_ids),
        service_tier=body.tier if body.service_tier is not None else None,
        prompts=list(shown.values()),
        prompt_only=ctx.limit == 0,
    )
    salt = ctx.client.salt(deps.settings.tenant_secret, body.cache_salt or "")
    if len(limits) > 1:
        ctx.prompts = [
            RequestContext(
                id=f"{ctx.id}-{index}", under=ctx, first_choice=index * ctx.form.n, stages=[(Stage.READING, ctx.began)]
            )
            for index in range(len(limits))
        ]
    target = deps.settings.target(ctx.tier)
    for one, prompt, limit in zip(ctx.prompts or [ctx], shown.values(), limits, strict=True):
        sampling, packed = body.sampling(max(1, limit)), wire.pack_tokens(prompt.tokens)
        one.original = Work(tokens=prompt.tokens, packed=packed, sampling=sampling, salt=salt)
        wish = Wish(
            tokens=len(prompt.tokens),
            output=round(min(sampling.max_tokens, deps.fleet.expected_output)) * sampling.n,
            whole="" if sampling.prompt_logprobs is None else "prompt_logprobs",
            hits=await deps.prefixes.hits(packed, salt),
        )
        one.waiting = Waiting(
            tier=ctx.tier,
            tenant=ctx.client.tenant,
            tokens=wish.uncached,
            deadline=ctx.began + target.ttft_s,
            wish=wish,
            since=ctx.began,
        )


async def _prompts(deps: Deps, tokenizer: ChatTokenizer, body: RequestBody) -> dict[str, PromptShown]:
    """By the parameter that an error would name."""
    context = deps.fleet.max_model_len

    def fits(param: str) -> Callable[[int], object]:
        """Whether a prompt of so many tokens leaves room for one more; it raises ContextLengthExceeded."""
        return lambda count: fit(count, None, context, prompt_param=param, limit_param="")

    if isinstance(body, ChatBody):
        characters = sum(len(message.text()) for message in body.messages)
        fit_text(characters, tokenizer.longest, context, param="messages")
        return {"messages": PromptShown(tokens=await tokenizer.chat(body.messages, fits("messages")))}
    if not isinstance(body, CompletionBody):
        raise TypeError(f"no prompt in a {type(body).__name__}")
    prompts = {}
    for param, given in body.prompts():
        if isinstance(given, str):
            fit_text(len(given), tokenizer.longest, context, param=param)
        tokens = await tokenizer.text(given, fits(param)) if isinstance(given, str) else given
        if not tokens:
            raise reading.empty(param)
        prompts[param] = PromptShown(tokens=tokens)
        if body.echo:
            text = given if isinstance(given, str) else await tokenizer.shown(tokens)
            prompts[param] = PromptShown(tokens=tokens, echo=text, opening=await tokenizer.shown(tokens[:1]))
    return prompts


def _limit(deps: Deps, body: RequestBody, tokens: list[int], param: str) -> int:
    context = deps.fleet.max_model_len
    limit = fit(len(tokens), body.limit(), context, prompt_param=param, limit_param=body.limit_param())
    reading.check_limit(body, limit)
    return limit
