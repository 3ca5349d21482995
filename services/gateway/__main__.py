"""The gateway's process: settings in, everything wired together, and the way out on SIGTERM.

Exit codes: 0 after a drain, 2 for bad configuration (one line on stderr says what to do).
"""

import asyncio
import gc
import ipaddress
import logging
import signal
import socket
import ssl
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
import uvloop

from services.gateway import gateway as parts
from services.gateway.access.access import Access
from services.gateway.background import BackgroundTasks
from services.gateway.gateway import Gateway, not_ready
from services.gateway.http import shared_port
from services.gateway.http.server import bound_sends, make_server
from services.gateway.http.tokenizer import ChatTokenizer
from services.gateway.observe.metrics import Metrics
from services.gateway.observe.traces.export import OtlpExport, from_environment
from services.gateway.request.context import Deps
from shared import settings as configuration
from shared import telemetry
from shared.access.connection import open_redis
from shared.bus import Bus
from shared.bus_metrics import BusMetrics
from shared.errors import SettingsError
from shared.loop_lag import LoopLag
from shared.probes import Probes, listen
from shared.redis_login import check_login
from shared.settings import GatewaySettings
from shared.tls import load_pair

log = logging.getLogger(__name__)

# Young objects before a collection. Requests leave no cycles to speak of, and at Python's 700 the collector took a
# sixth of the gateway's time (measured at 128 clients).
GC_THRESHOLD = (50_000, 20, 50)
# How long a thread that checks or tokenises something large keeps the loop waiting, each time; Python's 5 ms add up.
SWITCH_S = 0.001


def main() -> int:
    try:
        settings = configuration.load(GatewaySettings)
        check_exposure(settings)
        check_https(settings)
        telemetry.start_logs(
            "gateway", settings.id, log_format=settings.log_format, level=settings.log_level, aside=True
        )
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        log.info("settings %s", configuration.shown(settings))
        export = from_environment()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve(settings, export))
        finally:
            if export is not None:
                export.close()
    except SettingsError as error:
        telemetry.flush_logs()
        sys.stderr.write(f"gateway: {error}\n")
        return 2
    return 0


def check_exposure(settings: GatewaySettings) -> None:
    """Without keys only loopback is served. Raises SettingsError."""
    if settings.keys or settings.allow_anonymous or settings.host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise SettingsError(
            f"setting 'host': {settings.host} is not loopback and no keys are configured; "
            "set BATON_KEYS to a file of keys or to redis (see baton keys --help), or BATON_ALLOW_ANONYMOUS=true to "
            "serve everybody"
        )


def check_https(settings: GatewaySettings) -> None:
    """Raises SettingsError for files that cannot be used."""
    if settings.https_cert or settings.https_key:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_pair(context, settings.https_cert, settings.https_key, names=("https_cert", "https_key"))


async def serve(settings: GatewaySettings, export: OtlpExport | None = None) -> None:
    """Until SIGTERM or SIGINT. Raises SettingsError."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    model = configuration.served_name(settings.model, settings.served_model_name)
    metrics = Metrics(model, each_token=settings.telemetry == "on")
    access = Access.open(settings, metrics.registry)
    listener = listen(settings.host, settings.port, setting="port", shared=settings.share_port)
    bound_sends(listener)
    try:
        tokenizer = await asyncio.to_thread(ChatTokenizer.load, settings.model, settings.revision)
        bus = await Bus.open(settings, f"gateway-{settings.id}")
    except SettingsError:
        listener.close()
        raise
    try:
        async with open_redis(settings.redis_url, tls=settings.tls) as redis, BackgroundTasks() as background:
            await check_login(redis)
            gateway = parts.make(
                settings,
                model,
                bus=bus,
                redis=redis,
                metrics=metrics,
                background=background,
                access=access,
                export=export,
            )
            await parts.listen(gateway)
            await _run(gateway, tokenizer, listener, stop)
    finally:
        await access.close()
        await bus.close()


async def _run(gateway: Gateway, tokenizer: ChatTokenizer, listener: socket.socket, stop: asyncio.Event) -> None:
    deps, settings = gateway.deps, gateway.deps.settings
    server = make_server(gateway, tokenizer)
    url = f"{'https' if settings.https_cert else 'http'}://{settings.host}:{listener.getsockname()[1]}"
    async with _probes(deps, stop, url) as probe_url, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(parts.watch(gateway, uuid.uuid4().hex, f"{probe_url}/metrics"))
        if settings.share_port:
            await shared_port.until_useful(deps, stop)
        # The service owns its signals, so uvicorn's own `serve` with its handlers is not used.
        serving = tasks.create_task(server._serve([listener]))  # noqa: SLF001
        gc.collect()
        gc.freeze()  # what is here now stays for good
        gc.set_threshold(*GC_THRESHOLD)
        sys.setswitchinterval(SWITCH_S)
        LoopLag(deps.metrics.registry).start()
        tapping = tasks.create_task(BusMetrics(deps.metrics.registry).run(deps.bus))
        log.info("listening on %s, model %s, arrangement %s", url, deps.model, settings.arrangement)
        await stop.wait()
        await _drain(gateway, server, listener)
        server.should_exit = True
        await serving
        watching.cancel()
        tapping.cancel()
    log.info("stopped")


@asynccontextmanager
async def _probes(deps: Deps, stop: asyncio.Event, url: str) -> AsyncIterator[str]:
    """Where to ask this gateway for its own: on a port that it shares, anyone of them would answer."""
    if not (deps.settings.share_port or deps.settings.probe_port):
        yield url
        return
    probes = Probes(deps.metrics.registry, lambda: "draining" if stop.is_set() else not_ready(deps))
    await probes.start(deps.settings.probe_host, deps.settings.probe_port)
    try:
        yield probes.url
    finally:
        await probes.close()


async def _drain(gateway: Gateway, server: uvicorn.Server, listener: socket.socket) -> None:
    settings = gateway.deps.settings
    log.info("draining, for at most %g s", settings.drain_s)
    ends_at = time.monotonic() + settings.drain_s
    gateway.dashboard.close()
    if settings.share_port:
        await shared_port.leave(server, listener, settings.drain_s)
    await parts.drain(gateway.deps, ends_at - time.monotonic())


if __name__ == "__main__":
    sys.exit(main())
