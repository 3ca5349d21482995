"""One prompt on its way through the cluster: place, reserve, prefill, decode, and again where that is right.

A request has one leg for each of its prompts; they share nothing but the client. Invariants: on every way out the
leg's stream is closed, its charges are given back and a Cancel is sent to each worker that may still work for it; an
attempt's number is never used twice; once the client has seen a token, the leg goes on after the last one that it has,
or fails (resume.py says which), and is never begun again.
"""

import logging
import time
from dataclasses import dataclass, field, replace
from heapq import nlargest
from operator import itemgetter

from opentelemetry import trace
from opentelemetry.util.types import AttributeValue

from services.gateway.answer import Answer
from services.gateway.edge.render import Usage
from services.gateway.gateway import Gateway
from services.gateway.placement import Placement, Wish
from services.gateway.prefilling import NoPrefill, Prefilling
from services.gateway.queue import Seat, Waiting
from services.gateway.receipt import Receipt
from services.gateway.resume import Load, Sent, goes_on_by_prompt, repeats_itself
from services.gateway.states import Course, State
from services.gateway.streams import Row, Stream
from shared import subjects, wire
from shared.errors import BatonError, Refused, ResumeInexact, Timeout, WorkerLost

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 4  # decode jobs lost without a new token in between
MAX_BUSY = 3  # refusals by workers that looked free; a stream that has begun goes by the queue's time alone
MOST_HOLDERS = 4  # nodes that a prefill worker is told of
RESERVE_S = 30.0  # a worker answers Busy well before


class WorkerBusy(Exception):
    """A worker refused; the leg goes back to placement."""

    def __init__(self, worker: str, reason: str) -> None:
        super().__init__(reason)
        self.worker = worker
        self.reason = reason


@dataclass(slots=True)
class Tries:
    """What has gone wrong so far."""

    attempt: int = -1
    lost: int = 0
    busy: int = 0
    last_busy: str = ""
    sent: int = 0  # tokens that the client had at the last loss
    avoid: dict[str, int] = field(default_factory=dict)


class Leg:
    """Create one a prompt and `run` it once."""

    def __init__(
        self,
        gateway: Gateway,
        load: Load,
        course: Course,
        receipt: Receipt,
        *,
        began: float,
        tier: str,
        tenant: str,
        hits: dict[str, int],
    ) -> None:
        self._gateway = gateway
        self._tier = tier
        self._tenant = tenant
        self._original = load
        self._load = load  # of this attempt
        self._sent = Sent(load.first_choice, load.sampling.n)
        self._course = course
        self._receipt = receipt
        self._began = began
        self._wish = Wish(
            tokens=len(load.tokens),
            output=round(min(load.sampling.max_tokens, gateway.fleet.expected_output)) * load.sampling.n,
            whole="" if load.sampling.prompt_logprobs is None else "prompt_logprobs",
            hits=hits,
        )
        self._entered = began  # when it came in line first
        self._waiting: Waiting | None = None  # as it did last
        self._promised_s: float | None = None  # time to first token
        self._tries = Tries()
        self._by_prompt = goes_on_by_prompt(load.sampling)
        self.first_token_at = 0.0
        self._last_token_at = 0.0
        self.finish_reasons: list[str] = []

    @property
    def generated(self) -> int:
        """Tokens that the client has, over all attempts."""
        return self._sent.count

    @property
    def gap_s(self) -> float:
        """Between two tokens, on average; 0 for fewer than two."""
        return (self._last_token_at - self.first_token_at) / max(1, self._sent.count - 1)

    @property
    def began(self) -> bool:
        """A worker was asked."""
        return self._tries.attempt >= 0

    async def run(self, out: Answer) -> Usage:
        """Raises the error that ends it."""
        self._entered = time.monotonic()
        lost: BatonError | None = None
        while True:
            try:
                seat = await self._place()
            except Refused as refused:
                raise (lost if lost is not None and self._sent.has_begun else refused) from None
            try:
                usage = await self._serve(seat, out)
                break
            except WorkerBusy as busy:
                self._back_to_queue(busy)
            except BatonError as error:
                self._again(error, seat)
                lost = error
                self._entered = time.monotonic()
            finally:
                self._gateway.seating.unseat(seat)
        self._course.enter(State.DONE)
        self._gateway.seating.answered(self._tier, self._tenant, usage.completion)
        return usage

    # ---- 4: queue, placement -------------------------------------------------------------------------------

    async def _place(self) -> Seat:
        """One that a worker refused comes back with its old deadline; one that is to be resumed goes before all."""
        self._course.enter(State.QUEUED)
        tries, target = self._tries, self._gateway.settings.target(self._tier)
        waiting = Waiting(
            tier=self._tier,
            tenant=self._tenant,
            tokens=self._wish.uncached,
            deadline=self._began + target.ttft_s,
            urgent=tries.lost > 0,
            wish=self._wish,
            avoid=tries.avoid,
            since=self._began,
            entered=self._entered,
            fresh=self._waiting is None,
        )
        self._waiting = waiting
        seat = await self._gateway.seating.take(waiting, tries.last_busy)
        self._promised_s = self._promised_s or waiting.expected_s
        self._receipt.placed(seat.placement, self._promised_s)
        self._note("placed", **placed(seat.placement))
        return seat

    # ---- 5 to 8: reserve, prefill, decode, stream ----------------------------------------------------------

    async def _serve(self, seat: Seat, out: Answer) -> Usage:
        """One attempt. Raises WorkerBusy, or the error that it ended with."""
        gateway, worker = self._gateway, seat.placement.decode
        self._tries.attempt += 1
        attempt = self._tries.attempt
        stream = gateway.streams.open(self._load.id, attempt, self._load.sampling.n, self._load.first_choice)
        stream.on_overrun = out.overrun
        stream.sink = lambda rows: self._pass(rows, out)
        prefilling: Prefilling | None = None
        refused = False
        try:
            with gateway.fleet.watching(worker, lambda: stream.fail(WorkerLost("the decode worker was lost"))):
                self._course.enter(State.RESERVING)
                accepted = await self._reserve(seat, attempt)
                self._course.enter(State.HANDOFF)
                if seat.placement.prefill is None:
                    stream.watch(time.monotonic())
                else:
                    prefilling = self._prefill(seat, accepted, stream)
                await self._stream(stream, out, prefilling)
            if prefilling is not None:
                await prefilling.reported()
            return self._usage(stream, accepted, prefilling)
        except WorkerBusy:
            refused = True
            raise
        finally:
            gateway.streams.close(stream)
            if prefilling is not None:
                prefilling.close()
            if not (refused or stream.ended):
                gateway.cancel(worker, self._load.id, attempt)

    async def _reserve(self, seat: Seat, attempt: int) -> wire.Accepted:
        gateway, worker = self._gateway, seat.placement.decode
        load, forces = self._load, gateway.fleet.forces(worker)
        if load.replay and not (forces or repeats_itself(load.sampling)):
            if gateway.fleet.has_forcing():
                raise WorkerBusy(worker, "cannot_repeat")
            raise ResumeInexact("the stream was lost, and no worker there is can repeat what was sent")
        job = wire.DecodeJob(
            request=self._load.id,
            attempt=attempt,
            gateway=gateway.settings.id,
            tokens=self._load.packed,
            sampling=self._load.sampling,
            prefill=seat.placement.prefill is not None,
            timeout_s=self._left_s(),
            handoff_s=gateway.settings.handoff_s,
            replay=list(load.replay) if forces else [],
            salt=load.salt,
        )
        seat.charges[worker].sent_at = time.monotonic()
        subject = subjects.decode(gateway.settings.cluster, worker)
        reply = await gateway.ask(
            worker, subject, job, wire.Accepted, timeout_s=min(RESERVE_S, self._left_s()), brief=True
        )
        gateway.fleet.settle(seat.charges[worker])
        if isinstance(reply, wire.Busy):
            raise WorkerBusy(worker, reply.reason)
        return reply

    def _prefill(self, seat: Seat, accepted: wire.Accepted, stream: Stream) -> Prefilling | None:
        """The prompt is computed beside reading: decode starts by itself, with the blocks or without."""
        receipt = self._receipt
        if accepted.cached_tokens >= len(self._load.tokens):
            # The decode node holds every block already.
            self._gateway.seating.unseat(seat)
            receipt.prefill, receipt.reason = None, "cached"
            stream.watch(time.monotonic())
            return None
        job = wire.PrefillJob(
            request=self._load.id,
            attempt=accepted.attempt,
            gateway=self._gateway.settings.id,
            tokens=self._load.packed,
            lease=accepted.lease,
            node=accepted.node,
            timeout_s=self._left_s(),
            salt=self._load.salt,
            holders=dict(nlargest(MOST_HOLDERS, self._wish.hits.items(), key=itemgetter(1))),
        )
        return Prefilling(self._gateway, seat, job, stream, receipt)

    async def _stream(self, stream: Stream, out: Answer, prefilling: Prefilling | None) -> None:
        while rows := await stream.read():
            now = time.monotonic()
            if self._course.state is not State.STREAMING:
                self._course.enter(State.STREAMING)
            if new := self._sent.take(rows):
                self._saw(now, None if prefilling is None else prefilling.done_at)
                self.finish_reasons.extend(row.finish.reason for row in new if row.finish is not None)
                await out.rows(new)

    def _pass(self, rows: list[Row], out: Answer) -> bool:
        """The middle of an answer, written as it comes. False: these are for `_stream`."""
        if self._course.state is not State.STREAMING or self._sent.repeats:
            return False
        if any(row.finish is not None for row in rows) or not out.push(rows):
            return False
        self._sent.take(rows)
        self._saw(time.monotonic(), None)
        return True

    def _saw(self, now: float, prefilled_at: float | None) -> None:
        """Something new for the client; while a stream is resumed there was one long gap."""
        last, self._last_token_at = self._last_token_at, now
        if self.first_token_at:
            self._gateway.metrics.gap(now - last)
            return
        self.first_token_at = now
        self._note("first_token")
        self._receipt.first_token(self._course, ttft_s=now - self._began, prefilled_at=prefilled_at)
        self._gateway.metrics.first_token(now - self._began)
        if self._waiting is not None and not self._tries.lost:
            self._gateway.seating.saw(self._waiting, now)
            if self._promised_s is not None:
                self._gateway.seating.kept(self._promised_s, now - self._began)

    # ---- what next, when an attempt did not end well -------------------------------------------------------

    def _back_to_queue(self, busy: WorkerBusy) -> None:
        """With the old deadline, not to that worker before its next beat, and not for ever."""
        tries, gateway = self._tries, self._gateway
        tries.busy += 1
        tries.last_busy = busy.reason
        self._note("busy", worker=busy.worker, reason=busy.reason)
        tries.avoid[busy.worker] = gateway.fleet.beats(busy.worker)
        if tries.busy > MAX_BUSY and not self._sent.has_begun:
            raise gateway.seating.refusal(busy.reason)

    def _again(self, error: BatonError, seat: Seat) -> None:
        """Place it once more with the next attempt, or raise what ends it."""
        tries, gateway = self._tries, self._gateway
        before = self._course.state is not State.STREAMING and isinstance(error, (NoPrefill, Timeout))
        if not (before or error.retryable):
            raise error
        progress = self._sent.count > tries.sent
        tries.lost, tries.sent = 1 if progress else tries.lost + 1, self._sent.count
        if tries.lost >= MAX_ATTEMPTS:
            raise error
        self._receipt.retries += 1
        worker = seat.placement.decode
        if isinstance(error, NoPrefill):
            self._wish = replace(self._wish, whole="prefill_failed")
            phase = "prefill"
        else:
            tries.avoid[worker] = gateway.fleet.beats(worker)
            phase = "resume" if self._sent.has_begun else "decode"
        gateway.metrics.retried(phase)
        self._note("resume" if phase == "resume" else "retry", phase=phase, worker=worker, reason=error.code)
        if self._sent.has_begun:
            ways = {"by_prompt": self._by_prompt, "forces": gateway.fleet.has_forcing()}
            self._load = self._original.after(*self._sent.resume(**ways))
            self._wish = replace(self._wish, tokens=len(self._load.tokens))
        log.info("request %s: attempt %d ended with %s", self._load.id, tries.attempt, error.code)

    def _usage(self, stream: Stream, accepted: wire.Accepted, prefilling: Prefilling | None) -> Usage:
        decode = stream.usage or wire.DecodeUsage()
        if prefilling is not None:
            # What prefill found is what nobody computed; blocks that got lost on the way were computed after all.
            cached = (prefilling.done.cached_tokens if prefilling.done else 0) - decode.recomputed_tokens
        elif self._receipt.path == "split":
            cached = accepted.cached_tokens - decode.recomputed_tokens
        else:
            cached = decode.loaded_tokens + decode.engine_cached_tokens
        # The last prompt token is always computed: it gives the first token's logits.
        prompt = len(self._original.tokens)
        cached = min(max(0, cached), prompt - 1)
        self._receipt.cached_tokens = cached
        resumed = self._load is not self._original
        completion = self._sent.count if resumed else decode.completion_tokens or stream.tokens
        return Usage(prompt=prompt, completion=completion, cached=cached)

    def _note(self, event: str, **attributes: AttributeValue) -> None:
        """On the request's span."""
        trace.get_current_span().add_event(event, attributes)

    def _left_s(self) -> float:
        return max(0.1, self._gateway.settings.request_s - (time.monotonic() - self._began))


def placed(placement: Placement) -> dict[str, AttributeValue]:
    """For a span."""
    predicted_s = placement.predicted_ttft_s
    return {
        "path": placement.path,
        "reason": placement.reason,
        "prefill": placement.prefill or "",
        "decode": placement.decode,
        **({} if predicted_s is None else {"predicted_ttft_ms": round(predicted_s * 1000, 1)}),
    }
