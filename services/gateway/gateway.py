"""What all requests of one gateway share: who is alive, who waits, whose tokens arrive.

Invariants: a question to a worker ends at once when that worker is lost; what is sent to a worker is charged to it
in the same step in which it is placed; beats, pings and deadlines on progress are one task.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from redis.asyncio import Redis

from services.gateway.access.access import Access
from services.gateway.admission import Snapshot
from services.gateway.chores import Chores
from services.gateway.cluster_metrics import ClusterMetrics
from services.gateway.costs import Costs
from services.gateway.dashboard.feed import Feed
from services.gateway.edge.tokens import ChatTokenizer
from services.gateway.fleet import BEAT_S, PING_S, SUSPECT_S, Fleet
from services.gateway.metrics import Metrics
from services.gateway.prefixes import Prefixes
from services.gateway.replicas import Line, Replicas
from services.gateway.roster import Roster
from services.gateway.seating import Seating
from services.gateway.streams import Streams
from services.gateway.traces.export import OtlpExport
from services.gateway.traces.traces import Traces
from shared import subjects, wire
from shared.bus import Bus, Question
from shared.errors import (
    BatonError,
    BusUnavailable,
    Draining,
    Timeout,
    WorkerLost,
)
from shared.exposition import serve_metrics
from shared.settings import GatewaySettings
from shared.version import VERSION

if TYPE_CHECKING:
    from services.gateway.journey import Journey

log = logging.getLogger(__name__)

M = TypeVar("M", bound=wire.Message)

CANCEL_S = 5.0
GOODBYE_S = 2.0  # for the last error events to be written
NOBODY_S = 5.0  # that a request in line waits for a decode worker when none is alive; a paused one comes back sooner


class Gateway:
    """Create, then `listen` and run `watch` beside the HTTP server."""

    def __init__(
        self,
        settings: GatewaySettings,
        model: str,
        *,
        bus: Bus,
        tokenizer: ChatTokenizer,
        redis: Redis,
        metrics: Metrics,
        chores: Chores,
        access: Access | None = None,
        export: OtlpExport | None = None,
    ) -> None:
        """`access`: without it everybody is let in. `export`: takes the traces that are kept."""
        self.settings = settings
        self.model = model  # served name
        self.bus = bus
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.chores = chores
        self.access = access or Access()
        self.access.start(chores)
        self.fleet = Fleet(model, gateway=settings.id, arrangement=settings.arrangement)
        self.fleet.on_change(self._fleet_changed)
        self.seating = Seating(settings, self.fleet)
        self.queue = self.seating.queue
        self.prefixes = Prefixes(
            redis, settings.cluster, self.fleet, index_s=settings.index_s, failed=metrics.index_failed
        )
        self.streams = Streams(self.cancel)
        self.roster = Roster()
        self.traces = Traces(settings, bus, metrics.registry, others=self._other_gateways, export=export)
        self.cluster_metrics = ClusterMetrics(
            bus, settings.cluster, settings.id, metrics.registry, lambda: self.roster.live(time.monotonic())
        )
        target = settings.target("default")
        needs = {"split": {"prefill", "decode"}, "unsplit": {"decode"}, "auto": {"decode"}}[settings.arrangement]
        self._replicas = Replicas(frozenset(needs), target.ttft_s, target.itl_s)
        self._costs = Costs(settings.prices)
        self.dashboard = Feed(
            settings,
            model,
            bus=bus,
            fleet=self.fleet,
            metrics=metrics,
            price_per_hour=lambda: self._costs.per_hour,
        )
        self.journeys: set[Journey] = set()
        self._prompts = 0  # of all journeys: each takes a place
        self._idle = asyncio.Event()
        self._idle.set()
        self._heard_self_at = float("-inf")
        self._reconnects = bus.reconnects  # as seen last
        self._brief: set[Callable[[BatonError], None]] = set()  # ends of questions whose answers are due
        self._nobody_since: float | None = None  # no decode worker alive
        self.draining = False
        self.seen_path = False
        self._change = asyncio.Event()
        metrics.live(
            active=lambda: len(self.journeys),
            queued=lambda: len(self.queue),
            queued_tokens=lambda: self.queue.tokens,
            promise_ratio=lambda: self.seating.promise_ratio,
            workers=self.fleet.states,
            dropped=lambda: bus.bad_messages + self.streams.bad_rows,
            streams=lambda: len(self.streams),
            wanted=lambda: self._replicas.wanted,
            costs=self._costs,
            limits={
                "requests": settings.max_requests,
                "queued_tokens": settings.max_queued_tokens,
                "body_bytes": settings.max_bodies_bytes,
                "connections": settings.max_connections,
                **self.traces.limits,
            },
        )

    async def listen(self) -> None:
        await self.bus.listen(subjects.all_beats(self.settings.cluster), self._on_beat)
        await self.bus.listen(subjects.gateway(self.settings.cluster, self.settings.id), self._on_batch)
        await self.bus.listen(subjects.all_traffic(self.settings.cluster), self.dashboard.hear_traffic)
        await self.traces.listen()
        await serve_metrics(self.bus, self.settings.cluster, "gateway", self.settings.id, self.metrics.registry)
        await self.bus.flush()
        self.chores.start(self.dashboard.run())

    async def watch(self, incarnation: str, metrics_url: str) -> None:
        """Beat, ping those who are late, and look for streams that stand still; until cancelled."""
        pinging: set[str] = set()
        while True:
            now = time.monotonic()
            self._look_at_bus(now)
            if self._hears(now):
                for worker in self.fleet.check(now):
                    if worker not in pinging:
                        pinging.add(worker)
                        self.chores.start(self._ping(worker, pinging))
            else:
                self.fleet.excuse(now)
            self._look_at_queue(now)
            self._look_at_load(now)
            self.streams.check(now, self.settings.progress_s)
            with contextlib.suppress(BatonError):  # the bus is away; it will be back
                await self._beat(incarnation, metrics_url)
                await self.traces.ask_for_held()
            await asyncio.sleep(BEAT_S)

    # ---- for admission and placement -----------------------------------------------------------------------

    def not_ready(self) -> str | None:
        """Why a load balancer should send nobody here; None when it may."""
        if self.draining:
            return "draining"
        if not self.seen_path:
            return "no complete path through the cluster has been ready yet"
        return self.access.not_ready()

    def snapshot(self, *, more: int, tokens: int) -> Snapshot:
        """`more`: prompts that a request has beyond its first; `tokens`: of all of them."""
        return Snapshot(
            draining=self.draining,
            connected=self.bus.connected,
            decode_alive=self.fleet.has("decode"),
            requests=self._prompts - 1 + more,  # the one that asks is among them
            max_requests=self.settings.max_requests,
            queued_tokens=self.queue.tokens + tokens,
            max_queued_tokens=self.settings.max_queued_tokens,
            retry_after_s=lambda: self.seating.retry_after_s(tokens),
        )

    def pump(self) -> None:
        """Something has been heard that may make room."""
        if len(self.queue):
            self.queue.pump()

    async def fleet_change(self) -> None:
        """Until the fleet is not what it was: a beat came, a worker was lost."""
        await self._change.wait()

    def join(self, journey: "Journey") -> None:
        self.journeys.add(journey)
        self._prompts += 1
        self._idle.clear()

    def more_prompts(self, count: int) -> None:
        self._prompts += count

    def leave(self, journey: "Journey") -> None:
        """A request has gone: perhaps another fits."""
        self.journeys.discard(journey)
        self._prompts -= journey.prompts
        if not self.journeys:
            self._idle.set()
        self.pump()

    async def drain(self, grace_s: float) -> None:
        """Refuse what is new, let what runs finish, end the rest with an error that says why."""
        self.draining = True
        if await self._empty(grace_s):
            return
        for journey in list(self.journeys):
            journey.abort(Draining("this gateway is shutting down"))
        await self._empty(GOODBYE_S)

    async def _empty(self, wait_s: float) -> bool:
        try:
            async with asyncio.timeout(wait_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # ---- to workers ----------------------------------------------------------------------------------------

    async def ask(
        self, worker: str, subject: str, message: wire.Message, expect: type[M], *, timeout_s: float, brief: bool
    ) -> M | wire.Busy:
        """Bus.request that ends at once, with WorkerLost, when the fleet says that the worker is gone.

        `brief`: the answer is due at once, so it ends with BusUnavailable when the bus was away meanwhile: question or
        answer may be lost. Else somebody looks for the outcome in another way.
        """
        question = Question(self.bus, subject, message, expect)
        if brief:
            self._brief.add(question.end)
        try:
            with self.fleet.watching(
                worker, lambda: question.end(WorkerLost("the worker was lost before it answered"))
            ):
                reply = await question.answer(timeout_s)
        finally:
            self._brief.discard(question.end)
        self.fleet.report(worker, reply.backlog, time.monotonic())  # type: ignore[union-attr] # answers to jobs have it
        return reply

    def cancel(self, worker: str, request: str, attempt: int) -> None:
        """Tell a worker that nobody waits for this any more."""
        self.chores.start(self._cancel(worker, wire.Cancel(request=request, attempt=attempt)))

    async def _cancel(self, worker: str, message: wire.Cancel) -> None:
        subject = subjects.cancel(self.settings.cluster, worker)
        try:
            await self.bus.request(subject, message, wire.Done, timeout_s=CANCEL_S)
        except BatonError as error:
            # A worker that is gone has nothing to cancel; one that is deaf drops the job with its lease.
            log.info("cancel at %s unanswered: %s", worker, error.code)

    async def _ping(self, worker: str, pinging: set[str]) -> None:
        try:
            subject = subjects.ping(self.settings.cluster, worker)
            await self.bus.request(subject, wire.Ping(), wire.Pong, timeout_s=PING_S)
        except (WorkerLost, Timeout) as error:
            if self._hears(time.monotonic()):
                log.warning("%s is lost: %s", worker, error.code)
                self.fleet.lose(worker)
        except BatonError as error:
            log.info("ping of %s: %s", worker, error.code)
        finally:
            pinging.discard(worker)

    async def _beat(self, incarnation: str, metrics_url: str) -> None:
        settings = self.settings
        beat = wire.Heartbeat(
            role="gateway",
            id=settings.id,
            incarnation=incarnation,
            state="draining" if self.draining else "starting" if self.not_ready() else "ready",
            model=self.model,
            backlog=wire.Backlog(
                running=len(self.streams),
                waiting=len(self.queue),
                queued_tokens=self.queue.tokens,
                queued_prompts=len(self.queue),
            ),
            metrics_url=metrics_url,
            version=VERSION,
        )
        await self.bus.publish(subjects.beat(settings.cluster, "gateway", settings.id), beat)

    # ---- from the bus --------------------------------------------------------------------------------------

    def _on_beat(self, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.Heartbeat):
            if message.id == self.settings.id:
                self._heard_self_at = time.monotonic()
            self.roster.hear(message, time.monotonic())
            if message.role == "gateway":
                self.access.hear(message, time.monotonic())
            self.fleet.hear(message, time.monotonic())
            self.dashboard.hear(message, time.monotonic())

    def _on_batch(self, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.TokenBatch):
            now = time.monotonic()
            self._look_at_bus(now)
            self.streams.put(message, now)
            if self.fleet.report(message.worker, message.backlog, now):
                self.pump()

    def _other_gateways(self) -> list[str]:
        members = self.roster.live(time.monotonic(), "gateway")
        return [member.id for member in members if member.id != self.settings.id]

    def _hears(self, now: float) -> bool:
        """Whose own beats do not come back cannot tell a silent worker from a bus that stands still."""
        return self.bus.connected and now - self._heard_self_at < SUSPECT_S

    def _look_at_bus(self, now: float) -> None:
        if self._reconnects != self.bus.reconnects:
            self._reconnects = self.bus.reconnects
            self.streams.bus_was_away(now)
            for end in list(self._brief):
                end(BusUnavailable("the bus was away while a worker was asked"))

    def _look_at_queue(self, now: float) -> None:
        """When the last decode worker has died its successor takes longer than clients should be kept: say so."""
        if self.fleet.has("decode") or not self._hears(now):
            self._nobody_since = None
            return
        if self._nobody_since is None:
            self._nobody_since = now
        if now - self._nobody_since > NOBODY_S:
            self.queue.refuse(lambda: self.seating.refusal(""))

    def _look_at_load(self, now: float) -> None:
        """What an autoscaler and whoever pays want to know."""
        prompts, tokens = self.fleet.lines_elsewhere(now)
        line = Line(prompts=prompts + len(self.queue), tokens=tokens + self.queue.tokens)
        self._replicas.see(self.fleet.everybody(), line, now)
        roles = [member.role for member in self.roster.live(now)]
        served = self.metrics.tokens["prompt"] + self.metrics.tokens["completion"]
        self._costs.see(roles, tokens=served, requests=self.metrics.requests, now=now)

    def _fleet_changed(self) -> None:
        if not self.seen_path and self.fleet.has("decode"):
            self.seen_path = self.settings.arrangement != "split" or self.fleet.has("prefill")
        self.pump()
        change, self._change = self._change, asyncio.Event()
        change.set()
