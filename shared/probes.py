"""`/health`, `/ready` and `/metrics` of a service, on a port of their own: a busy data path cannot hide them."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shared.errors import SettingsError


class Probes:
    """Serves until closed. `ready` returns None when ready, else the reason why not."""

    def __init__(self, registry: CollectorRegistry, ready: Callable[[], str | None]) -> None:
        self._registry = registry
        self._ready = ready
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.url = ""

    async def start(self, host: str, port: int) -> None:
        """Listen; raises SettingsError when the port is taken."""
        listener = listen(host, port, setting="probe_port")
        self.url = f"http://{host}:{listener.getsockname()[1]}"
        app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/ready", self._ready_route),
                Route("/metrics", self._metrics),
            ]
        )
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        # The service owns its signals.
        self._task = asyncio.create_task(self._server._serve([listener]))  # noqa: SLF001

    async def close(self) -> None:
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready_route(self, _: Request) -> Response:
        reason = self._ready()
        return JSONResponse({"ready": reason is None, "reason": reason}, status_code=200 if reason is None else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def listen(host: str, port: int, *, setting: str, shared: bool = False) -> socket.socket:
    """A bound socket, or a SettingsError that names the setting.

    `shared`: others of this user that ask for the same may have the port, too; the kernel spreads connections over
    those that listen.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(f"setting {setting!r}: cannot listen on {host}:{port}: {error.strerror}") from error
    return listener
