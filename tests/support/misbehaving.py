"""An HTTP server that does what it is told, right or wrong: one manner a request, in turns."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import chain, repeat
from typing import Self

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = b'data: {"choices":[{"index":0,"text":" a","finish_reason":null}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
RECEIPT = (
    b': baton-receipt {"path":"split","retries":1,"cached_tokens":4,"predicted_ttft_ms":80,"actual_ttft_ms":100.0,'
    b'"stages_ms":{"queue":12.5,"reserve":null}}\n\n'
)
DONE = b"data: [DONE]\n\n"
MODELS = b'{"object":"list","data":[{"id":"odd","object":"model","max_model_len":4096}]}'

Writer = asyncio.StreamWriter
Manner = Callable[[Writer], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def plain(status: str, body: bytes, headers: str = "") -> bytes:
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}content-length: {len(body)}\r\n\r\n".encode()
        + body
    )


def sends(*pieces: bytes, close: bool = False) -> Manner:
    """Each piece is a write of its own."""

    async def manner(writer: Writer) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if close:
            writer.close()

    return manner


async def hangs(_: Writer) -> None:
    """Says nothing, and keeps the connection."""


async def drops(writer: Writer) -> None:
    writer.close()


right = sends(HEAD, chunk(TOKEN), chunk(TOKEN), chunk(TOKEN + USAGE), chunk(RECEIPT + DONE) + b"0\r\n\r\n")
unmarked = sends(HEAD, chunk(TOKEN), b"0\r\n\r\n")  # ends as HTTP wants it, without [DONE]
cut = sends(HEAD, chunk(TOKEN), chunk(TOKEN), close=True)
stalls = sends(HEAD, chunk(TOKEN))
fails_late = sends(
    HEAD, chunk(TOKEN), chunk(b'data: {"error":{"message":"m","type":"server_error","code":"worker_lost"}}\n\n')
)
no_json = sends(HEAD, chunk(b"data: {this is no JSON\n\n"), chunk(b'data: {"usage":{\n\n'))
empty = sends(HEAD, chunk(DONE) + b"0\r\n\r\n")
endless_event = sends(HEAD, *[chunk(b"x" * 65536)] * 40)
no_http = sends(b"\x00\x01 hello, I speak something else\r\n\r\n")
not_a_stream = sends(plain("200 OK", b'{"choices":[]}'))
bad_request = sends(plain("400 Bad Request", b'{"error":{"message":"m","code":"invalid_value"}}'))
broken_error = sends(plain("500 Internal Server Error", b"<html>oops"))
moved = sends(plain("302 Found", b"", "location: /elsewhere\r\n"))


def shed(status: str = "429 Too Many Requests", headers: str = "retry-after: 1\r\n") -> Manner:
    return sends(plain(status, b'{"error":{"message":"m","type":"server_error","code":"queue_full"}}', headers))


class Misbehaving:
    """The first requests meet `manners` in this order, all others `then`."""

    def __init__(self, *manners: Manner, then: Manner = right) -> None:
        self._next = chain(manners, repeat(then))
        self._writers: list[Writer] = []
        self.requests: list[bytes] = []
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self._writers.append(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (
                        int(line.partition(b":")[2])
                        for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length:")
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                if head.startswith(b"GET /v1/models"):
                    writer.write(plain("200 OK", MODELS))
                elif head.startswith(b"GET"):
                    writer.write(plain("404 Not Found", b"{}"))
                else:
                    self.requests.append(head + body)
                    await next(self._next)(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
