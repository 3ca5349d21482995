"""What all requests of one gateway share: how it is made, what it hears, and what it looks after five times a second.

Invariants: one listener to beats (scheduling/members.py), one to batches; beats, pings, deadlines and progress are one
task; nothing here belongs to one request.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field

from redis.asyncio import Redis

from services.gateway.access.access import Access
from services.gateway.background import BackgroundTasks
from services.gateway.observe.cluster_metrics import ClusterMetrics
from services.gateway.observe.costs import Costs
from services.gateway.observe.dashboard.feed import Feed
from services.gateway.observe.metrics import Metrics
from services.gateway.observe.replicas import Replicas, WaitingLine
from services.gateway.observe.traces.export import OtlpExport
from services.gateway.observe.traces.traces import Traces
from services.gateway.request import answer, attempt, tokens
from services.gateway.request.context import Deps, Running, Streams, abort
from services.gateway.scheduling.fleet import BEAT_S, PING_S, Fleet
from services.gateway.scheduling.members import Members
from services.gateway.scheduling.prefixes import Prefixes
from services.gateway.scheduling.queue import Queue
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BatonError, Draining, RequestTimeout, Timeout, WorkerLost
from shared.exposition import serve_metrics
from shared.settings import GatewaySettings
from shared.version import VERSION

log = logging.getLogger(__name__)

GOODBYE_S = 2.0  # for the last error events to be written
NOBODY_S = 5.0  # that a request in line waits for a decode worker when none is alive; a paused one comes back sooner


@dataclass(slots=True)
class Gateway:
    """The parts of one gateway. Make it with `make`, then `listen` and run `watch` beside the HTTP server."""

    deps: Deps
    dashboard: Feed
    cluster_metrics: ClusterMetrics
    replicas: Replicas
    costs: Costs
    reconnects: int  # of the bus, as seen last
    pinging: set[str] = field(default_factory=set)
    nobody_since: float | None = None  # no decode worker alive


def make(
    settings: GatewaySettings,
    model: str,
    *,
    bus: Bus,
    redis: Redis,
    metrics: Metrics,
    background: BackgroundTasks,
    access: Access,
    export: OtlpExport | None = None,
) -> Gateway:
    """`export`: takes the traces that are kept."""
    access.start(background)
    fleet = Fleet(model, gateway=settings.id, arrangement=settings.arrangement)
    costs = Costs(settings.prices)
    dashboard = Feed(settings, model, bus=bus, fleet=fleet, metrics=metrics, price_per_hour=lambda: costs.per_hour)

    def hear_gateway(beat: wire.Heartbeat, now: float) -> None:
        if beat.role == "gateway":
            access.hear(beat, now)

    members = Members(settings.id, hear_gateway, fleet.hear, dashboard.hear)
    deps = Deps(
        settings=settings,
        model=model,
        bus=bus,
        metrics=metrics,
        background=background,
        access=access,
        fleet=fleet,
        members=members,
        queue=Queue(settings, fleet),
        prefixes=Prefixes(redis, settings.cluster, fleet, index_s=settings.index_s, failed=metrics.index_failed),
        traces=Traces(
            settings,
            bus,
            metrics.registry,
            others=lambda: members.other_gateways(time.monotonic()),
            export=export,
        ),
        running=Running(),
        streams=Streams(),
    )
    deps.running.idle.set()
    target = settings.target("default")
    needs = {"split": {"prefill", "decode"}, "unsplit": {"decode"}, "auto": {"decode"}}[settings.arrangement]
    gateway = Gateway(
        deps=deps,
        dashboard=dashboard,
        cluster_metrics=ClusterMetrics(
            bus, settings.cluster, settings.id, metrics.registry, lambda: members.live(time.monotonic())
        ),
        replicas=Replicas(frozenset(needs), target.ttft_s, target.itl_s),
        costs=costs,
        reconnects=bus.reconnects,
    )
    fleet.on_loss(lambda worker: attempt.worker_lost(deps, worker))
    fleet.on_change(lambda: _fleet_changed(deps))
    _show_figures(gateway)
    return gateway


def _show_figures(gateway: Gateway) -> None:
    deps, settings = gateway.deps, gateway.deps.settings
    deps.metrics.live(
        active=lambda: len(deps.running),
        queued=lambda: len(deps.queue),
        queued_tokens=lambda: deps.queue.tokens,
        promise_ratio=lambda: deps.queue.promise_ratio,
        workers=deps.fleet.states,
        dropped=lambda: deps.bus.bad_messages + deps.streams.bad_rows,
        streams=lambda: len(deps.streams),
        body_bytes=lambda: deps.running.body_bytes,
        wanted=lambda: gateway.replicas.wanted,
        costs=gateway.costs,
        limits={
            "requests": settings.max_requests,
            "queued_tokens": settings.max_queued_tokens,
            "body_bytes": settings.max_bodies_bytes,
            "connections": settings.max_connections,
            **deps.traces.limits,
        },
    )


# ---- from the bus ------------------------------------------------------------------------------------------------


async def listen(gateway: Gateway) -> None:
    deps, cluster, id_ = gateway.deps, gateway.deps.settings.cluster, gateway.deps.settings.id

    def on_beat(message: wire.AnyMessage) -> None:
        if isinstance(message, wire.Heartbeat):
            deps.members.hear(message, time.monotonic())

    def on_batch(message: wire.AnyMessage) -> None:
        if isinstance(message, wire.TokenBatch):
            now = time.monotonic()
            _look_at_bus(gateway, now)
            tokens.deliver(deps, message, now)
            if deps.fleet.report(message.worker, message.backlog, now):
                deps.queue.pump()

    await deps.bus.listen(subjects.all_beats(cluster), on_beat)
    await deps.bus.listen(subjects.gateway(cluster, id_), on_batch)
    await deps.bus.listen(subjects.all_traffic(cluster), gateway.dashboard.hear_traffic)
    await deps.traces.listen()
    await serve_metrics(deps.bus, cluster, "gateway", id_, deps.metrics.registry)
    await deps.bus.flush()
    deps.background.start(gateway.dashboard.run())


def _fleet_changed(deps: Deps) -> None:
    running = deps.running
    if not running.has_seen_path and deps.fleet.has("decode"):
        running.has_seen_path = deps.settings.arrangement != "split" or deps.fleet.has("prefill")
    deps.queue.pump()


# ---- five times a second -----------------------------------------------------------------------------------------


async def watch(gateway: Gateway, incarnation: str, metrics_url: str) -> None:
    """Beat, ping those who are late, and end what stands still or takes too long; until cancelled."""
    deps = gateway.deps
    while True:
        now = time.monotonic()
        _look_at_bus(gateway, now)
        if _hears(deps, now):
            for worker in deps.fleet.check(now):
                if worker not in gateway.pinging:
                    gateway.pinging.add(worker)
                    deps.background.start(_ping(gateway, worker))
        else:
            deps.fleet.excuse(now)
        _look_at_queue(gateway, now)
        _look_at_load(gateway, now)
        _look_at_requests(deps, now)
        with contextlib.suppress(BatonError):  # the bus is away; it will be back
            await _beat(deps, incarnation, metrics_url)
            await deps.traces.ask_for_held()
        await asyncio.sleep(BEAT_S)


def _look_at_requests(deps: Deps, now: float) -> None:
    attempt.sweep(deps, now)
    tokens.sweep(deps, now)
    idle_s = deps.settings.header_wait_s
    for ctx in list(deps.running.requests):
        if now > ctx.deadline:
            if ctx.is_read:
                abort(ctx, Timeout("the request took too long"))
            else:
                abort(ctx, RequestTimeout("the body did not arrive in time"))
        elif ctx.writer is not None and now - max(ctx.began, ctx.written_at) > idle_s:
            answer.keep_alive(ctx, now)


def _look_at_bus(gateway: Gateway, now: float) -> None:
    deps = gateway.deps
    if gateway.reconnects != deps.bus.reconnects:
        gateway.reconnects = deps.bus.reconnects
        tokens.bus_was_away(deps, now)
        attempt.bus_was_away(deps)


def _look_at_queue(gateway: Gateway, now: float) -> None:
    """When the last decode worker has died its successor takes longer than clients should be kept: say so."""
    deps = gateway.deps
    if deps.fleet.has("decode") or not _hears(deps, now):
        gateway.nobody_since = None
        return
    if gateway.nobody_since is None:
        gateway.nobody_since = now
    if now - gateway.nobody_since > NOBODY_S:
        deps.queue.refuse(lambda: deps.queue.refusal(""))


def _look_at_load(gateway: Gateway, now: float) -> None:
    """What an autoscaler and whoever pays want to know."""
    deps = gateway.deps
    prompts, waiting = deps.fleet.lines_elsewhere(now)
    line = WaitingLine(prompts=prompts + len(deps.queue), tokens=waiting + deps.queue.tokens)
    gateway.replicas.see(deps.fleet.everybody(), line, now)
    roles = [member.role for member in deps.members.live(now)]
    served = deps.metrics.tokens["prompt"] + deps.metrics.tokens["completion"]
    gateway.costs.see(roles, tokens=served, requests=deps.metrics.requests, now=now)


def _hears(deps: Deps, now: float) -> bool:
    return deps.bus.connected and deps.members.hears_itself(now)


async def _ping(gateway: Gateway, worker: str) -> None:
    deps = gateway.deps
    try:
        subject = subjects.ping(deps.settings.cluster, worker)
        await deps.bus.request(subject, wire.Ping(), wire.Pong, timeout_s=PING_S)
    except (WorkerLost, Timeout) as error:
        if _hears(deps, time.monotonic()):
            log.warning("%s is lost: %s", worker, error.code)
            deps.fleet.lose(worker)
    except BatonError as error:
        log.info("ping of %s: %s", worker, error.code)
    finally:
        gateway.pinging.discard(worker)


async def _beat(deps: Deps, incarnation: str, metrics_url: str) -> None:
    settings = deps.settings
    beat = wire.Heartbeat(
        role="gateway",
        id=settings.id,
        incarnation=incarnation,
        state="draining" if deps.running.draining else "starting" if not_ready(deps) else "ready",
        model=deps.model,
        backlog=wire.Backlog(
            running=len(deps.streams),
            waiting=len(deps.queue),
            queued_tokens=deps.queue.tokens,
            queued_prompts=len(deps.queue),
        ),
        metrics_url=metrics_url,
        version=VERSION,
    )
    await deps.bus.publish(subjects.beat(settings.cluster, "gateway", settings.id), beat)


# ---- from start to end -------------------------------------------------------------------------------------------


def not_ready(deps: Deps) -> str | None:
    """Why a load balancer should send nobody here; None when it may."""
    if deps.running.draining:
        return "draining"
    if not deps.running.has_seen_path:
        return "no complete path through the cluster has been ready yet"
    return deps.access.not_ready()


async def drain(deps: Deps, grace_s: float) -> None:
    """Refuse what is new, let what runs finish, end the rest with an error that says why."""
    deps.running.draining = True
    if await until_idle(deps, grace_s):
        return
    for ctx in list(deps.running.requests):
        abort(ctx, Draining("this gateway is shutting down"))
    await until_idle(deps, GOODBYE_S)


async def until_idle(deps: Deps, wait_s: float) -> bool:
    """Whether no request was left in that time."""
    try:
        async with asyncio.timeout(wait_s):
            await deps.running.idle.wait()
    except TimeoutError:
        return False
    return True
