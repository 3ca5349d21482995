"""nats-py's client on shorter ways, and never without TLS where that was asked for.

What it does with a message by itself (a queue and a task for each subscription, a future and a task's turn for each
flush) costs every process of the cluster more than the message's own handling. So a message goes from the parser to its
handler in one step, and publications to the socket without a task, at most one write a millisecond. These are private
parts of nats-py: pyproject.toml bounds its version, and tests/unit/test_private_parts.py says what has changed.

Invariants: commands reach the server in the order in which they were given; while there is no connection, or the server
takes nothing, publications wait in nats-py's own bounded buffer; with `tls://` nothing is said, least of all the
password, to a server that offers no TLS.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import nats.errors
from nats.aio.client import NATS_HDR_LINE, Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

# Between two writes of a busy process: each wakes the server and then every hearer, which costs more than what is said.
APART_S = 0.001
BURST = 4.0  # writes that one who has been quiet may do at once: the messages of a single request do not wait
MAX_UNSENT_BYTES = 256 * 1024  # in the socket's buffer: above it publications wait for the flusher, who waits for it

Headers = dict[str, str] | None
Handler = Callable[[str, str, bytes, Headers], None]  # subject, reply, data, headers; must not raise


class NatsClient(Client):  # type: ignore[misc] # nats-py has no types
    def __init__(self, *, must_encrypt: bool) -> None:
        super().__init__()
        self._must_encrypt = must_encrypt
        self._handlers: dict[int, Handler] = {}  # by subscription
        self._unsent: list[bytes] = []
        self._sending: asyncio.Handle | None = None  # will write them
        self._writes_left = BURST
        self._counted_at = 0.0  # by the loop's clock

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
            self._send()
            await super().publish(subject, payload, reply, headers)
            return
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)
        if headers:
            lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
            head = b"%b\r\n%b\r\n" % (NATS_HDR_LINE, lines.encode())
            command = f"HPUB {subject} {reply} {len(head)} {len(head) + len(payload)}\r\n".encode()
            self._unsent += (command, head, payload, b"\r\n")
        else:
            self._unsent += (f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload, b"\r\n")
        if self._sending is None:
            loop = asyncio.get_running_loop()
            now = loop.time()
            self._writes_left = min(BURST, self._writes_left + (now - self._counted_at) / APART_S)
            self._counted_at = now
            early_s = (1.0 - self._writes_left) * APART_S
            self._sending = loop.call_later(early_s, self._send) if early_s > 0 else loop.call_soon(self._send)

    def _send(self) -> None:
        """Write what was published since the last time."""
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        if not self._unsent:
            return
        data, self._unsent = b"".join(self._unsent), []
        self._writes_left -= 1.0
        if self.is_connected and not self._pending and self._transport:
            self._transport.write(data)
        else:  # nats-py writes it when it has a connection again
            self._pending.append(data)
            self._pending_data_size += len(data)

    async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
        """A subscription, a ping: behind all that was published before."""
        self._send()
        await super()._send_command(cmd, priority)

    async def close(self) -> None:
        self._send()
        await super().close()

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
