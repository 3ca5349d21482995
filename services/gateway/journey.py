"""One request's life, from first byte to last: read `_stages` from top to bottom beside design section 2.

Each of its prompts goes the middle of the way by itself: leg.py. Invariants: one coroutine owns the request, and its
legs end with it; one leg that fails ends all; the client gets one answer or one error.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass

from opentelemetry import trace

from services.gateway import genai
from services.gateway.access.access import Bill, Wanted
from services.gateway.access.client import ANONYMOUS
from services.gateway.admission import admit, fit, fit_text
from services.gateway.answer import Answer, answer
from services.gateway.edge import pieces, reading
from services.gateway.edge.render import Form, Prompt, Usage
from services.gateway.edge.requests import Body, ChatBody, CompletionBody
from services.gateway.edge.tokens import Fits
from services.gateway.epilogue import Epilogue
from services.gateway.exchange import Exchange
from services.gateway.gateway import Gateway
from services.gateway.leg import Leg
from services.gateway.receipt import Receipt
from services.gateway.resume import Load
from services.gateway.states import ENDS, Course, State
from shared import wire
from shared.errors import BatonError, Cancelled, Internal, Refused, Timeout

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request that has passed the edge."""

    body: Body
    prompts: list[Prompt]
    limits: list[int]  # how many tokens each may be answered with
    packed: list[bytes]
    salt: bytes  # of the tenant's KV blocks
    hits: list[dict[str, int]]  # node -> leading tokens of each whose KV it holds


class Journey:
    def __init__(self, gateway: Gateway, exchange: Exchange, kind: type[Body]) -> None:
        self._gateway = gateway
        self._exchange = exchange
        self._kind = kind
        self._courses = [Course()]  # of the legs; until they begin, the first is the request's
        self._tier = "default"
        self._client = ANONYMOUS  # until the edge knows better
        self._bill: Bill | None = None  # from admission on
        self._legs: list[Leg] = []
        self._prompt_tokens = 0  # as far as they are known
        self._usage: Usage | None = None  # in the end
        self._began = time.monotonic()
        self._scope: asyncio.Timeout | None = None
        self._verdict: BatonError | None = None

    @property
    def state(self) -> State:
        """Of the first leg that has not ended."""
        return next((one.state for one in self._courses if one.state not in ENDS), self._courses[-1].state)

    @property
    def prompts(self) -> int:
        return len(self._courses)

    def abort(self, error: BatonError) -> None:
        """End it from outside: the client has left, the gateway is going."""
        if self._verdict is None and self._scope is not None and not self._scope.expired():
            self._verdict = error
            if isinstance(error, Cancelled):
                self._gateway.metrics.cancelled(self.state.value)
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def run(self) -> None:
        """The boundary: whatever happens inside becomes an answer, a span and figures."""
        gateway, exchange = self._gateway, self._exchange
        gateway.join(self)
        error: BatonError | None = None
        with gateway.traces.request(exchange.traceparent) as span:
            try:
                await self._travel()
            except BatonError as failed:
                error = failed
            except Exception:  # the boundary: the client gets an answer, the log the reason
                log.exception("request %s failed", exchange.id)
                error = Internal("internal error")
            finally:
                for course in self._courses:
                    course.fail()
                exchange.release()
                gateway.leave(self)
                self._settle(error)
            if error is not None:
                if span is not None:
                    span.set_attributes(genai.error(error.code))
                    span.set_status(trace.StatusCode.ERROR, error.code)
                if isinstance(error, Refused):
                    queued_s = max(course.spent_s.get(State.QUEUED, 0.0) for course in self._courses)
                    exchange.receipts[0].refused(queued_s)
                    trace.get_current_span().add_event("shed", {"reason": error.code})
                if not isinstance(error, Cancelled):
                    await exchange.fail(error)
        self._epilogue(error).tell(gateway, span)
        if error is not None:
            # Its traceback has the frames, and they have it: a circle that holds the prompt until the collector comes.
            error.__traceback__ = error.__context__ = error.__cause__ = None

    def _epilogue(self, error: BatonError | None) -> Epilogue:
        return Epilogue(
            request_id=self._exchange.request_id,
            response_id=self._response_id(),
            tenant=self._client.tenant,
            tier=self._tier,
            receipt=self._exchange.receipt,
            error=error,
            duration_s=time.monotonic() - self._began,
            gap_s=max((leg.gap_s for leg in self._legs), default=None),
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(leg.generated for leg in self._legs),
            usage=self._usage,
        )

    async def _travel(self) -> None:
        try:
            async with asyncio.timeout(self._gateway.settings.request_s) as self._scope:
                await self._stages()
        except TimeoutError:
            raise self._verdict or Timeout("the request took too long") from None
        finally:
            self._scope = None

    async def _stages(self) -> None:
        asked = await self._edge()
        await self._admit(asked)
        out = answer(self._exchange, self._form(asked))
        self._legs = self._made_legs(asked)
        usages = await _together([leg.run(out) for leg in self._legs])
        await self._end(out, Usage.total(usages, answered=asked.body.limit() != 0))

    # ---- 1: edge -------------------------------------------------------------------------------------------

    async def _edge(self) -> Asked:
        gateway, exchange, settings = self._gateway, self._exchange, self._gateway.settings
        self._client = gateway.access.client(exchange.authorization)
        trace.get_current_span().set_attributes(
            {"baton.tenant": self._client.tenant, "baton.request_id": exchange.request_id}
        )
        data = await exchange.body()
        body = await pieces.read(
            self._kind, data, model=gateway.model, max_n=settings.max_n, max_prompts=settings.max_prompts
        )
        exchange.checked()
        self._tier = body.tier
        self._client.check(model=body.model, tier=body.tier)
        exchange.streams = body.streamed
        exchange.check_stream()
        exchange.watch(gateway.chores, lambda: self.abort(Cancelled("the client left")))
        prompts = await self._prompts(body)
        self._prompt_tokens = sum(len(prompt.tokens) for prompt in prompts.values())
        named = {param: prompt.tokens for param, prompt in prompts.items()}
        limits = [self._limit(body, tokens, param) for param, tokens in named.items()]
        reading.check_token_ids(body, named, gateway.tokenizer.vocabulary)
        trace.get_current_span().set_attributes(
            genai.request(
                chat=isinstance(body, ChatBody),
                model=body.model,
                max_tokens=max(limits),
                response_id=self._response_id(),
            )
        )
        trace.get_current_span().set_attribute("baton.tier", self._tier)
        packed = [wire.pack_tokens(tokens) for tokens in named.values()]
        salt = self._client.salt(settings.tenant_secret, body.cache_salt or "")
        hits = [await gateway.prefixes.hits(tokens, salt) for tokens in packed]
        return Asked(body=body, prompts=list(prompts.values()), limits=limits, packed=packed, salt=salt, hits=hits)

    async def _prompts(self, body: Body) -> dict[str, Prompt]:
        """Every prompt as token ids, by the parameter that an error would name."""
        tokenizer, context = self._gateway.tokenizer, self._gateway.fleet.max_model_len
        if isinstance(body, ChatBody):
            characters = sum(len(message.text()) for message in body.messages)
            fit_text(characters, tokenizer.longest, context, param="messages")
            return {"messages": Prompt(tokens=await tokenizer.chat(body.messages, self._fits("messages")))}
        if not isinstance(body, CompletionBody):
            raise TypeError(f"no prompt in a {type(body).__name__}")
        prompts = {}
        for param, given in body.prompts():
            if isinstance(given, str):
                fit_text(len(given), tokenizer.longest, context, param=param)
            tokens = await tokenizer.text(given, self._fits(param)) if isinstance(given, str) else given
            if not tokens:
                raise reading.empty(param)
            prompts[param] = Prompt(tokens=tokens)
            if body.echo:
                text = given if isinstance(given, str) else await tokenizer.shown(tokens)
                prompts[param] = Prompt(tokens=tokens, echo=text, opening=await tokenizer.shown(tokens[:1]))
        return prompts

    def _fits(self, param: str) -> Fits:
        """Whether a prompt of so many tokens leaves room for one more; it raises ContextLengthExceeded."""
        context = self._gateway.fleet.max_model_len
        return lambda count: fit(count, None, context, prompt_param=param, limit_param="")

    def _limit(self, body: Body, tokens: list[int], param: str) -> int:
        context = self._gateway.fleet.max_model_len
        limit = fit(len(tokens), body.limit(), context, prompt_param=param, limit_param=body.limit_param())
        reading.check_limit(body, limit)
        return limit

    # ---- 2 and 3: admission, and a leg for each prompt -----------------------------------------------------

    async def _admit(self, asked: Asked) -> None:
        self._courses[0].enter(State.ADMISSION)
        await self._charge(asked)
        more = len(asked.prompts) - 1
        admit(self._gateway.snapshot(more=more, tokens=self._prompt_tokens))
        self._courses += [Course(State.ADMISSION) for _ in range(more)]
        self._exchange.receipts += [Receipt() for _ in range(more)]
        self._gateway.more_prompts(more)

    async def _charge(self, asked: Asked) -> None:
        body = asked.body
        wanted = Wanted(
            prompt=self._prompt_tokens,
            completion=sum(asked.limits) * (body.n or 1),
            bounded=body.limit() is not None,
        )
        self._bill = await self._gateway.access.charge(self._client, body.model, wanted, self._exchange.headers)

    def _settle(self, error: BatonError | None) -> None:
        if self._bill is not None:
            began, generated = any(leg.began for leg in self._legs), sum(leg.generated for leg in self._legs)
            self._gateway.access.settle(self._bill, error, began=began, generated=generated)

    def _made_legs(self, asked: Asked) -> list[Leg]:
        body, id_, many = asked.body, self._exchange.id, len(asked.prompts) > 1
        loads = [
            Load(
                id=f"{id_}-{index}" if many else id_,
                tokens=prompt.tokens,
                packed=packed,
                sampling=body.sampling(max(1, limit)),
                first_choice=index * (body.n or 1),
                salt=asked.salt,
            )
            for index, (prompt, packed, limit) in enumerate(zip(asked.prompts, asked.packed, asked.limits, strict=True))
        ]
        parts = zip(loads, asked.hits, self._courses, self._exchange.receipts, strict=True)
        return [
            Leg(
                self._gateway,
                load,
                course,
                receipt,
                began=self._began,
                tier=self._tier,
                tenant=self._client.tenant,
                hits=hits,
            )
            for load, hits, course, receipt in parts
        ]

    # ---- 4 to 8 are in leg.py; 9: the end ------------------------------------------------------------------

    async def _end(self, out: Answer, usage: Usage) -> None:
        legs = self._legs
        self._usage = usage
        if self._bill is not None:
            self._bill.usage = usage
        reasons = [reason for leg in legs for reason in leg.finish_reasons]
        trace.get_current_span().set_attributes(genai.response(usage, reasons))
        first_token_at = min(leg.first_token_at for leg in legs)
        decoding_s = time.monotonic() - first_token_at
        self._gateway.metrics.served(usage, decoding_s, self._client.tenant)
        if self._in_time(usage.completion / max(1, len(reasons)), first_token_at - self._began, decoding_s):
            self._gateway.metrics.within_target(self._tier)
        await out.end(usage)

    def _in_time(self, tokens: float, ttft_s: float, decoding_s: float) -> bool:
        """Whether its tier's targets were kept, by the first token and by the mean gap; `tokens`: of each choice."""
        target = self._gateway.settings.target(self._tier)
        return ttft_s <= target.ttft_s and decoding_s <= target.itl_s * max(1.0, tokens - 1)

    def _form(self, asked: Asked) -> Form:
        body = asked.body
        return Form(
            chat=isinstance(body, ChatBody),
            id=self._response_id(),
            created=int(time.time()),
            model=body.model,
            n=body.n or 1,
            top_logprobs=body.logprob_count(),
            prompt_logprobs=body.prompt_logprobs,
            include_usage=body.include_usage,
            return_token_ids=bool(body.return_token_ids),
            service_tier=body.tier if body.service_tier is not None else None,
            prompts=asked.prompts,
            prompt_only=body.limit() == 0,
        )

    def _response_id(self) -> str:
        return ("chatcmpl-" if self._kind is ChatBody else "cmpl-") + self._exchange.id


async def _together(runs: list[Coroutine[None, None, Usage]]) -> list[Usage]:
    """All of them side by side. Raises what the first failed with, and cancels the others."""
    if len(runs) == 1:
        return [await runs[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run) for run in runs]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
