"""The HTTP server around a gateway: uvicorn with our application, our connections and their bounds."""

import functools
import logging
import socket
from typing import Any

import uvicorn

from services.gateway.answer.connection import Connection, ConnectionFigures, Limits, room
from services.gateway.gateway import Gateway
from services.gateway.http.app import Front
from services.gateway.http.tokenizer import ChatTokenizer

log = logging.getLogger(__name__)

# The kernel would keep up to 4 MiB for a client that has stopped reading. It doubles what is asked for.
SEND_BUFFER_BYTES = 128 * 1024


def make_server(gateway: Gateway, tokenizer: ChatTokenizer) -> uvicorn.Server:
    settings = gateway.deps.settings
    max_connections = room(settings.max_connections)
    if max_connections < settings.max_connections:
        log.warning("the limit on open files leaves room for %d connections", max_connections)
    traffic = ConnectionFigures(gateway.deps.metrics.registry)
    limits = Limits(
        header_s=settings.header_s, write_s=settings.write_s, max_connections=max_connections, traffic=traffic
    )
    protocol: Any = functools.partial(Connection, limits=limits)
    config = uvicorn.Config(
        Front(gateway, tokenizer),
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,  # nothing here goes by what a proxy says of its client (gate.py)
        timeout_graceful_shutdown=1,
        ssl_certfile=settings.https_cert or None,
        ssl_keyfile=settings.https_key or None,
    )
    server = uvicorn.Server(config)
    traffic.watch(lambda: len(server.server_state.connections))
    return server


def bound_sends(listener: socket.socket) -> None:
    """Accepted connections inherit it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
