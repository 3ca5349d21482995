"""kv_transfer's process: settings in, everything wired together, and the way out on SIGTERM.

Exit codes: 0 after SIGTERM or SIGINT, with arena and socket removed; 2 for bad configuration (one line on stderr says
what to do).
"""

import asyncio
import gc
import logging
import signal
import sys
import uuid
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop
from prometheus_client import CollectorRegistry

from services.kv_transfer.arena import Arena
from services.kv_transfer.bus_service import BusService
from services.kv_transfer.index import IndexWriter
from services.kv_transfer.metrics import KvMetrics
from services.kv_transfer.peers.peers import Peers
from services.kv_transfer.server import KvServer, Outside
from services.kv_transfer.store import Store
from shared import settings as configuration
from shared import telemetry
from shared.bus import Bus
from shared.bus_metrics import BusMetrics
from shared.errors import SettingsError
from shared.exposition import serve_metrics
from shared.loop_lag import LoopLag
from shared.prefix_index import open_redis
from shared.probes import Probes
from shared.process_metrics import watch_process
from shared.redis_login import check_login
from shared.settings import KvSettings
from shared.span_sender import SpanSender

log = logging.getLogger(__name__)

SWITCH_S = 0.0005  # a thread whose block has come waits no longer than this for the loop to let it go on


def main() -> int:
    try:
        settings = configuration.load(KvSettings)
        telemetry.start_logs("kv", settings.id, log_format=settings.log_format, level=settings.log_level, aside=True)
        log.info("settings %s", configuration.shown(settings))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings))
    except SettingsError as error:
        telemetry.flush_logs()
        sys.stderr.write(f"kv_transfer: {error}\n")
        return 2
    return 0


async def serve(settings: KvSettings) -> None:
    """Until SIGTERM or SIGINT. Raises SettingsError."""
    sys.setswitchinterval(SWITCH_S)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    incarnation = uuid.uuid4().hex
    async with AsyncExitStack() as stack:
        where = (Path(settings.shm_dir), settings.cluster, settings.node, settings.arena_gib)
        arena = await asyncio.to_thread(Arena.create, *where)
        stack.callback(arena.close)
        store = Store(settings.node, arena.size_bytes, arena.words)
        registry = CollectorRegistry()
        watch_process(registry)
        LoopLag(registry).start()
        metrics = KvMetrics(registry, store)
        spans = SpanSender("kv", settings.id, registry)
        telemetry.start(enabled=settings.telemetry == "on").others = spans.take
        probes = Probes(registry, lambda: "stopping" if stop.is_set() else None)
        await probes.start(settings.probe_host, settings.probe_port)
        stack.push_async_callback(probes.close)
        bus = await Bus.open(settings, settings.id)
        stack.push_async_callback(bus.close)
        redis = open_redis(settings.redis_url, settings.tls)
        stack.push_async_callback(redis.aclose)
        await check_login(redis)
        index = IndexWriter(
            redis,
            cluster=settings.cluster,
            node=settings.node,
            incarnation=incarnation,
            held_keys=store.held_keys,
            holds=store.holds,
            dropped=metrics.index_dropped.inc,
        )
        stack.push_async_callback(index.retire)
        peers = Peers(settings, store, arena, metrics, lambda: server.pump())  # noqa: PLW0108 - made below
        peers.listen()
        stack.push_async_callback(peers.close)
        service = BusService(
            bus,
            store,
            lambda lease: server.release(lease),  # noqa: PLW0108 - made below
            cluster=settings.cluster,
            service_id=settings.id,
            node=settings.node,
            incarnation=incarnation,
            metrics_url=probes.url,
            peers=peers,
            moved_bytes=metrics.moved_bytes,
        )
        outside = Outside(
            host_closed=service.host_closed,
            key_changed=index.note,
            check_push=peers.pushes.check,
            push_begun=peers.pushes.begin,
            push_ready=peers.pushes.ready,
            lease_ended=peers.lease_ended,
        )
        server = KvServer(settings.node, store, arena, metrics, outside)
        show(metrics, server, index, bus)
        show_peers(metrics, peers)
        await server.start(settings.kv_socket)
        stack.push_async_callback(server.close)
        await service.serve()
        await serve_metrics(bus, settings.cluster, "kv", settings.id, registry)
        gc.freeze()  # what is here by now stays: a full collection pauses long enough to be noticed
        log.info("ready: arena %s of %.2f GiB on %s", arena.name, arena.size_bytes / 2**30, settings.kv_socket)
        await run_until(stop, service, index, spans.run(bus, settings.cluster), BusMetrics(registry).run(bus))


def show(metrics: KvMetrics, server: KvServer, index: IndexWriter, bus: Bus) -> None:
    metrics.gauge("baton_kv_connections", "Local connections", lambda: len(server.connections))
    metrics.gauge("baton_kv_index_backlog", "Index updates not written yet", lambda: index.backlog)
    metrics.gauge("baton_kv_index_connected", "1 while Redis takes updates", lambda: index.number is not None)
    metrics.gauge("baton_kv_bus_connected", "1 while NATS is there", lambda: bus.connected)
    metrics.gauge("baton_kv_bad_messages", "Bus messages that broke their handler", lambda: bus.bad_messages)


def show_peers(metrics: KvMetrics, peers: Peers) -> None:
    metrics.gauge("baton_kv_pushes", "Transfers to other nodes under way", lambda: len(peers.pushes))
    metrics.gauge("baton_kv_arrivals", "Transfers from other nodes under way", lambda: len(peers.arrivals))
    metrics.gauge("baton_kv_peer_links", "Connections to and from other nodes", lambda: peers.links)
    metrics.gauge("baton_kv_peers", "Nodes whose address is known", lambda: len(peers.directory))
    metrics.gauge(
        "baton_kv_peer_bytes_per_second", "How fast blocks come from other nodes", lambda: peers.speed.bytes_per_s
    )


async def run_until(
    stop: asyncio.Event, service: BusService, index: IndexWriter, *others: Coroutine[None, None, None]
) -> None:
    """Beat, write the index and do what else there is until asked to stop.

    Clients recompute what they cannot load, so nothing is drained.
    """
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(work) for work in (service.beat_forever(), index.run(), *others)]
        await stop.wait()
        log.info("stopping")
        service.draining = True
        await service.beat()
        for task in running:
            task.cancel()


if __name__ == "__main__":
    sys.exit(main())
