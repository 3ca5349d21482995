"""nats-py's client on shorter ways, and never without TLS where that was asked for.

What it does with a message by itself (a queue and a task for each subscription, a future and a task's turn for each
flush) costs every process of the cluster more than the message's own handling. So a message goes from the parser to its
handler, and a publication from its caller to the socket, in one step. These are private parts of nats-py:
pyproject.toml bounds its version, and tests/unit/test_private_parts.py says what has changed.

Invariants: commands reach the server in the order in which they were given; while there is no connection, or the server
takes nothing, publications wait in nats-py's own bounded buffer; with `tls://` nothing is said, least of all the
password, to a server that offers no TLS.
"""

from collections.abc import Callable
from typing import Any

import nats.errors
from nats.aio.client import NATS_HDR_LINE, Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

MAX_UNSENT_BYTES = 256 * 1024  # in the socket's buffer: above it publications wait for the flusher, who waits for it

Headers = dict[str, str] | None
Handler = Callable[[str, str, bytes, Headers], None]  # subject, reply, data, headers; must not raise


class NatsClient(Client):  # type: ignore[misc] # nats-py has no types
    def __init__(self, *, must_encrypt: bool) -> None:
        super().__init__()
        self._must_encrypt = must_encrypt
        self._handlers: dict[int, Handler] = {}  # by subscription

    async def handle(self, subject: str, handler: Handler) -> Subscription:
        """Subscribe a plain function."""

        async def before_it_is_known(msg: Msg) -> None:
            handler(msg.subject, msg.reply, msg.data, msg.headers)

        subscription = await self.subscribe(subject, cb=before_it_is_known)
        self._handlers[subscription._id] = handler  # noqa: SLF001
        return subscription

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "", headers: Headers = None) -> None:
        transport = self._transport
        if (
            self._pending
            or not self.is_connected
            or self.is_draining_pubs
            or len(payload) > self._max_payload
            or not isinstance(transport, TcpTransport)
            or transport._io_writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES  # noqa: SLF001
        ):
            await super().publish(subject, payload, reply, headers)
            return
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        if headers:
            lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
            head = b"%b\r\n%b\r\n" % (NATS_HDR_LINE, lines.encode())
            command = f"HPUB {subject} {reply} {len(head)} {len(head) + len(payload)}\r\n".encode()
            transport.write(b"%b%b%b\r\n" % (command, head, payload))
        else:
            transport.write(b"%b%b\r\n" % (f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload))

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        handler = self._handlers.get(sid)
        if handler is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        found = await self._process_headers(headers) if headers else None
        handler(subject.decode(), reply.decode(), data, found)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Nats-py goes on in plain text when a server, or who stands before it, says so; this does not."""
        if initial_connection and self._must_encrypt and not info.get("tls_required"):
            raise nats.errors.Error("the server offers no TLS")
        await super()._process_info(info, initial_connection)
