"""A client that speaks HTTP by hand: it sends what it is told, byte for byte, and reads when the test wants it to."""

import asyncio
import json
import socket
from typing import Self
from urllib.parse import urlsplit

WAIT_S = 10.0


class RawClient:
    """Nothing is read in the background: bytes that nobody asks for stay in the kernel, and then at the server."""

    def __init__(self, url: str, *, receive_buffer_bytes: int | None = None) -> None:
        self._address = (urlsplit(url).hostname, urlsplit(url).port)
        self._data = b""  # read and not yet taken
        self._socket = socket.socket()
        self._socket.setblocking(False)
        if receive_buffer_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)

    async def __aenter__(self) -> Self:
        async with asyncio.timeout(WAIT_S):
            await asyncio.get_running_loop().sock_connect(self._socket, self._address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(WAIT_S):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def post(self, path: str, body: dict, *headers: str) -> None:
        content = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *headers]
        await self.send("\r\n".join([*lines, f"content-length: {len(content)}", "", ""]).encode() + content)

    async def rest(self) -> bytes:
        """Everything until the server closes; what was in flight when it cut the connection may be missing."""
        data, self._data = self._data, b""
        async with asyncio.timeout(WAIT_S):
            try:
                while part := await asyncio.get_running_loop().sock_recv(self._socket, 65536):
                    data += part
            except ConnectionError:
                pass
        return data

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next one with a content-length: status, headers, body."""
        status, *lines = (await self.until(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        while len(self._data) < int(headers["content-length"]):
            await self._more()
        body = self._take(int(headers["content-length"]))
        return int(status.split()[1]), headers, body

    async def until(self, end: bytes) -> bytes:
        """What comes up to there."""
        while end not in self._data:
            await self._more()
        return self._take(self._data.index(end) + len(end))

    def _take(self, size: int) -> bytes:
        taken, self._data = self._data[:size], self._data[size:]
        return taken

    async def _more(self) -> None:
        async with asyncio.timeout(WAIT_S):
            data = await asyncio.get_running_loop().sock_recv(self._socket, 65536)
        if not data:
            raise EOFError("the server closed without an answer")
        self._data += data
