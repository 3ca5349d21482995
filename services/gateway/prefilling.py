"""The prefill side of one attempt: the same job to one worker after another until one is done.

Runs as a task beside the reading of the decode stream. Its outcome reaches the reader through that stream: nothing
when it goes well or when decode went on without it, `NoPrefill` when no worker is left, the error itself when the
request is at fault.
"""

import asyncio
import logging
import time

from opentelemetry import trace

from services.gateway.fleet import Charge
from services.gateway.gateway import Gateway
from services.gateway.queue import Seat
from services.gateway.receipt import Receipt
from services.gateway.streams import Stream
from shared import subjects, wire
from shared.errors import BatonError, Internal, RequestError, ServiceError

log = logging.getLogger(__name__)

REPORT_S = 0.5  # how long a finished stream waits for the reply that says what was cached


class NoPrefill(ServiceError):
    """Nobody is left to compute the prompt for this decode attempt; the request is placed whole."""

    code = "no_prefill"


class Prefilling:
    """Starts at once; `close` on every way out."""

    def __init__(self, gateway: Gateway, seat: Seat, job: wire.PrefillJob, stream: Stream, receipt: Receipt) -> None:
        self.done: wire.PrefillDone | None = None
        self.done_at: float | None = None
        self._gateway = gateway
        self._seat = seat
        self._job = job
        self._stream = stream
        self._receipt = receipt
        self._tried: set[str] = set()
        self._asking: str | None = None  # may still work for us
        self._task = gateway.chores.start(self._run(), on_error=lambda _: stream.fail(Internal("internal error")))

    async def reported(self) -> None:
        """Output may be complete a moment before the reply is here."""
        if not self._task.done():
            await asyncio.wait({self._task}, timeout=REPORT_S)

    def close(self) -> None:
        self._task.cancel()
        if self._asking is not None:
            self._gateway.cancel(self._asking, self._job.request, self._job.attempt)

    async def _run(self) -> None:
        until = time.monotonic() + self._gateway.settings.handoff_s
        worker = self._seat.placement.prefill
        while worker is not None:
            try:
                reply = await self._ask(worker)
            except RequestError as error:
                self._stream.fail(error)
                return
            except BatonError as error:
                log.info("request %s: prefill at %s ended with %s", self._job.request, worker, error.code)
                self._leave(worker, error.code)
            else:
                if isinstance(reply, wire.PrefillDone):
                    self.done = reply
                    self.done_at = time.monotonic()
                    self._stream.watch(self.done_at)
                    return
            worker = await self._next(worker, until)
            if time.monotonic() >= until:
                # Decode stops waiting for the blocks at the same time and computes the prompt itself.
                self._stream.watch(time.monotonic())
                return
        if not self._stream.started:  # else decode has given the blocks up and computed the prompt itself
            self._stream.fail(NoPrefill("no prefill worker is left"))

    async def _ask(self, worker: str) -> wire.PrefillDone | wire.Busy:
        gateway, job = self._gateway, self._job
        charge = self._charge(worker)
        charge.sent_at = time.monotonic()
        self._asking = worker
        self._receipt.prefill = worker
        try:
            subject = subjects.prefill(gateway.settings.cluster, worker)
            reply = await gateway.ask(worker, subject, job, wire.PrefillDone, timeout_s=job.timeout_s, brief=False)
            self._asking = None
            return reply
        finally:
            gateway.fleet.settle(charge)
            gateway.pump()

    def _leave(self, worker: str, reason: str) -> None:
        """It may have answered with an error, or not at all: then it must not go on for nobody."""
        self._tried.add(worker)
        self._asking = None
        self._gateway.cancel(worker, self._job.request, self._job.attempt)
        self._gateway.metrics.retried("prefill")
        trace.get_current_span().add_event("retry", {"phase": "prefill", "worker": worker, "reason": reason})
        self._receipt.retries += 1

    async def _next(self, last: str, until: float) -> str | None:
        """Somebody else with room; one that was only busy may be asked again. None: nobody is left, or it is late."""
        gateway, decode = self._gateway, self._seat.placement.decode
        busy = {last} - self._tried
        while time.monotonic() < until:
            if (other := gateway.seating.other_prefiller(self._tried | busy, decode)) is not None:
                return other
            if not gateway.fleet.has("prefill", besides=self._tried | {decode}):
                return None
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await gateway.fleet_change()
            except TimeoutError:
                break
            busy.clear()
        return None

    def _charge(self, worker: str) -> Charge:
        """The first worker's charge came with the seat."""
        charge = self._seat.charges.get(worker)
        if charge is None or not charge.open:
            charge = self._gateway.fleet.charge(
                worker, jobs=1, tokens=len(self._job.tokens) // wire.TOKEN_BYTES, now=time.monotonic()
            )
            self._seat.charges[worker] = charge
        return charge
