"""A server that answers without an engine: what HTTP, SSE and sockets cost in Python, and nothing else.

`python -m loadtest.instant --port 18000` serves `/v1/completions`, `/v1/chat/completions` and `/v1/models`. Every chunk
is built before it is needed; an event is one write unless `joined`. With a pace, token k of a stream is written at
(arrival + first_s + k * token_s), to about a tenth of a millisecond: a truth to compare a client's measurements with.
"""

import argparse
import asyncio
import heapq
import re
import socket
import sys
import time
from typing import Self, cast

import msgspec
import uvloop

from loadtest.load.alarm import Alarm

MODEL = "instant"
MAX_MODEL_LEN = 1 << 20
MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens": ?(\d+)')
LENGTH = re.compile(rb"content-length: ?(\d+)", re.IGNORECASE)
DEFAULT_TOKENS = 16
SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Manner(msgspec.Struct, frozen=True, kw_only=True):
    """How the server answers. `joined`: all events of an answer without a pace in one write."""

    first_s: float = 0.0
    token_s: float = 0.0
    joined: bool = False

    @property
    def paced(self) -> bool:
        return self.first_s > 0 or self.token_s > 0


class Chunks:
    """The prebuilt pieces of answers, for one API."""

    def __init__(self, *, chat: bool) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        self._head = f'"id":"x","object":"{kind}","created":1,"model":"{MODEL}"'
        text = '"delta":{"content":" a"}' if chat else '"text":" a"'
        rest = '"logprobs":null,"finish_reason":null}],"usage":null'
        self.token = _chunk(f'data: {{{self._head},"choices":[{{"index":0,{text},{rest}}}\n\n')
        role = '"delta":{"role":"assistant","content":""}'
        self.opening = SSE_HEAD + (
            _chunk(f'data: {{{self._head},"choices":[{{"index":0,{role},{rest}}}\n\n') if chat else b""
        )
        self._ends: dict[int, bytes] = {}

    def end(self, tokens: int) -> bytes:
        """What follows the last token: usage and [DONE]."""
        if tokens not in self._ends:
            usage = f'{{"prompt_tokens":1,"completion_tokens":{tokens},"total_tokens":{tokens + 1}}}'
            events = f'data: {{{self._head},"choices":[],"usage":{usage}}}\n\ndata: [DONE]\n\n'
            self._ends[tokens] = _chunk(events) + b"0\r\n\r\n"
        return self._ends[tokens]


class InstantServer:
    """`async with InstantServer(manner) as server: server.url`."""

    def __init__(self, manner: Manner | None = None, port: int = 0, host: str = "127.0.0.1") -> None:
        self.manner = manner or Manner()
        self.answered = 0
        self.accepted = 0
        self.connections: set[_Connection] = set()
        self.chunks = {chat: Chunks(chat=chat) for chat in (False, True)}
        self.pacer: _Pacer | None = None
        self._host, self._port = host, port
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def __aenter__(self) -> Self:
        self.pacer = _Pacer(self.manner.token_s) if self.manner.paced else None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), self._host, self._port, backlog=4096)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None  # noqa: S101 - entered
        self._server.close()
        for connection in list(self.connections):
            connection.transport.abort()
        await self._server.wait_closed()
        if self.pacer is not None:
            self.pacer.close()


class _Connection(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self, server: InstantServer) -> None:
        self._server = server
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own class is not one of asyncio's
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server.connections.add(self)
        self._server.accepted += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        while True:
            head = buffer.find(b"\r\n\r\n")
            if head < 0:
                break
            length = LENGTH.search(buffer, 0, head)
            end = head + 4 + (int(length[1]) if length else 0)
            if len(buffer) < end:
                break
            self._answer(buffer[:end])
            buffer = buffer[end:]
        self._buffer = buffer

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET "):
            self.transport.write(_get(request))
            return
        server = self._server
        wanted = MAX_TOKENS.search(request)
        tokens = max(1, int(wanted[1])) if wanted else DEFAULT_TOKENS
        chunks = server.chunks[b"/chat/" in request[: request.find(b"\r\n")]]
        server.answered += 1
        if server.pacer is not None:
            server.pacer.add(_Answer(self.transport, chunks, tokens), server.manner.first_s)
            return
        write = self.transport.write
        if server.manner.joined:
            write(chunks.opening + chunks.token * tokens + chunks.end(tokens))
            return
        write(chunks.opening)
        for _ in range(tokens):
            write(chunks.token)
        write(chunks.end(tokens))


class _Answer:
    """A paced stream: what is left of it."""

    def __init__(self, transport: asyncio.Transport, chunks: Chunks, tokens: int) -> None:
        self._transport, self._chunks, self._tokens, self._written = transport, chunks, tokens, 0

    def step(self) -> bool:
        """Write one token; False after the last one, or when the client has left."""
        if self._transport.is_closing():
            return False
        chunks = self._chunks
        self._written += 1
        last = self._written == self._tokens
        opening = chunks.opening if self._written == 1 else b""
        self._transport.write(opening + chunks.token + (chunks.end(self._tokens) if last else b""))
        return not last


class _Pacer:
    """Every stream's next token, by the time when it is due."""

    def __init__(self, token_s: float) -> None:
        self._token_s = token_s
        self._due: list[tuple[float, int, _Answer]] = []
        self._count = 0
        self._alarm = Alarm(self._ring)

    def add(self, answer: _Answer, first_s: float) -> None:
        self._push(time.monotonic() + first_s, answer)
        self._alarm.set(self._due[0][0])

    def close(self) -> None:
        self._due.clear()
        self._alarm.close()

    def _push(self, due_s: float, answer: _Answer) -> None:
        self._count += 1  # answers do not compare
        heapq.heappush(self._due, (due_s, self._count, answer))

    def _ring(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            due_s, _, answer = heapq.heappop(self._due)
            if answer.step():
                self._push(due_s + self._token_s, answer)
        if self._due:
            self._alarm.set(self._due[0][0])


def _get(request: bytes) -> bytes:
    found = request.startswith(b"GET /v1/models")
    model = {"id": MODEL, "object": "model", "created": 1, "owned_by": "loadtest", "max_model_len": MAX_MODEL_LEN}
    body = msgspec.json.encode({"object": "list", "data": [model]} if found else {"error": {"message": "not found"}})
    status = b"200 OK" if found else b"404 Not Found"
    return b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


def _chunk(text: str) -> bytes:
    """A piece of a body with HTTP's chunked encoding."""
    data = text.encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.instant", description=__doc__)
    parser.add_argument("--port", type=int, default=18000)
    parser.add_argument("--first-ms", type=float, default=0.0, help="from a request to its first token")
    parser.add_argument("--token-ms", type=float, default=0.0, help="between two tokens")
    parser.add_argument("--joined", action="store_true", help="a whole answer in one write")
    args = parser.parse_args()
    manner = Manner(first_s=args.first_ms / 1e3, token_s=args.token_ms / 1e3, joined=args.joined)

    async def serve() -> None:
        async with InstantServer(manner, args.port) as server:
            print(server.url, flush=True)
            await asyncio.Event().wait()

    try:
        uvloop.run(serve())
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
