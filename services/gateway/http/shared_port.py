"""How one of several gateways on a port joins the others there, and how it leaves them.

Invariants: the kernel sends nobody to a gateway that has not yet heard of the workers; a connection that it gave to a
gateway which leaves is answered by that gateway, and every later one goes to the others.
"""

import asyncio
import contextlib
import ctypes
import logging
import socket
import struct
from collections.abc import Callable

import uvicorn

from services.gateway.gateway import not_ready
from services.gateway.request.context import Deps

log = logging.getLogger(__name__)

JOIN_S = 5.0  # many beats; by then the others know of no worker either, and say so as well as this one
HANDSHAKE_S = 0.05  # a few round trips: for who is half connected
ACCEPT_S = 1.0  # for connections that wait in the kernel's queue
LINGER_SHARE = 0.5  # of the grace period, at most; the rest is for requests that run
LOOK_S = 0.02
SO_ATTACH_FILTER = 26  # Linux; the socket module does not name it
# Classic BPF, see linux/filter.h. A socket's filter sees the TCP header first; its flags are byte 13, and 2 is SYN.
NO_SYN = (
    (0x30, 0, 0, 13),  # load the byte
    (0x45, 0, 1, 2),  # SYN set: on to the next line, else skip it
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # keep all of it
)
CLOSE = (b"connection", b"close")


async def until_useful(deps: Deps, stop: asyncio.Event) -> None:
    """Wait for a path through the cluster, `stop`, or JOIN_S, whatever comes first."""

    async def path() -> None:
        while not_ready(deps) is not None:
            await deps.fleet.change()

    waits = {asyncio.create_task(path()), asyncio.create_task(stop.wait())}
    try:
        await asyncio.wait(waits, timeout=JOIN_S, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


async def leave(server: uvicorn.Server, listener: socket.socket, grace_s: float) -> None:
    """Close the listener, then serve what comes on the connections that there are, each answer the last of its own.

    Returns when none is open or idle any more, or clients had as long for that as between two requests at other times.
    """
    await _until(lambda: server.started)  # it may be asked to end as soon as it began
    turn_away(listener)
    await asyncio.sleep(HANDSHAKE_S)  # the server accepts meanwhile
    with contextlib.suppress(TimeoutError, OSError):
        async with asyncio.timeout(ACCEPT_S):
            await _until(lambda: not waiting(listener), look_s=0)
    for each in server.servers:
        each.close()
    log.info("the listener is closed; %d connections are open", len(server.server_state.connections))
    # uvicorn adds these to every answer that has not begun, and takes the list anew from its configuration each second.
    server.config.encoded_headers.append(CLOSE)
    server.server_state.default_headers.append(CLOSE)
    linger_s = min(float(server.config.timeout_keep_alive), grace_s * LINGER_SHARE)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(linger_s):
            await _until(lambda: not server.server_state.connections)
    for connection in list(server.server_state.connections):
        connection.shutdown()  # an idle one at once, a busy one after its answer


def turn_away(listener: socket.socket) -> None:
    """Let the kernel drop new SYNs: their clients send them again after a second, when this listener is gone.

    Closing alone would reset whoever came between the last accept and the close. What remains: a handshake
    that takes longer than HANDSHAKE_S is reset, unless net.ipv4.tcp_migrate_req is 1; and where a kernel refuses the
    filter, so is who comes in that moment.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in NO_SYN))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(NO_SYN), ctypes.addressof(code)))


def waiting(listener: socket.socket) -> int:
    """Connections that are complete and not accepted yet."""
    info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", info, 24)[0])  # tcpi_unacked: of a listener, the length of its queue


async def _until(true: Callable[[], bool], look_s: float = LOOK_S) -> None:
    while not true():  # noqa: ASYNC110 - neither uvicorn nor the kernel says when
        await asyncio.sleep(look_s)
