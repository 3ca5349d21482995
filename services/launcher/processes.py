"""Child processes: each in a session of its own, with its output in a log file, gone with all it started.

A child gets SIGTERM when its launcher dies in whatever way. What a child leaves in its process group is killed
before the kernel may give its number to anybody else.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from services.launcher.plan import Process

_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
LONGEST_LINE = 300
TRACKER_S = 2.0


class Child:
    """One started process. `exited` is done with its return code once it and its group are gone."""

    def __init__(self, process: Process, popen: "subprocess.Popen[bytes]", log: Path, log_start: int) -> None:
        self.process = process
        self.pid = popen.pid
        self.log = log
        self.started_s = time.monotonic()
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._popen = popen
        self._log_start = log_start
        self._is_ending = False

    def reap(self) -> None:
        """Notice the end, if it has come."""
        if self.exited.done():
            return
        # The zombie holds its number until it is waited for: the group cannot be anybody else's yet.
        if self._is_ending or os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
        self._is_ending = True
        if not self._has_followers():
            self._end()
            return
        # Python's resource tracker outlives a killed process to unlink its semaphores, and ignores SIGTERM.
        self.signal_group(signal.SIGTERM)
        asyncio.get_running_loop().call_later(TRACKER_S, self._end)

    def _has_followers(self) -> bool:
        """Whether anything of its group still runs."""
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if process.pid != self.pid and os.getpgid(process.pid) == self.pid:
                    return True
        return False

    def _end(self) -> None:
        self.signal_group(signal.SIGKILL)
        self.exited.set_result(self._popen.wait())

    def terminate(self) -> None:
        if not self.exited.done():
            os.kill(self.pid, signal.SIGTERM)  # not by Popen, which would reap it and free its number

    def signal_group(self, number: signal.Signals) -> None:
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def stop(self, limit_s: float) -> bool:
        """SIGTERM, then SIGKILL at the limit; False when it needed the second."""
        self.terminate()
        try:
            await asyncio.wait_for(self.wait(), limit_s)
        except TimeoutError:
            self.signal_group(signal.SIGKILL)
            await self.wait()
            return False
        return True

    async def wait(self) -> int:
        # Shielded: cancelling one who waits must not cancel what everybody waits for.
        return await asyncio.shield(self.exited)

    def last_words(self) -> str:
        """The last line that it wrote in this life."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - 16384))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "")[:LONGEST_LINE]


class Children:
    """All that this launcher started. Needs a running loop, on the main thread."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = dict(environ)  # what every child gets
        self._all: list[Child] = []
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def start(self, process: Process, settings: Mapping[str, str], log: Path) -> Child:
        with log.open("ab") as out:
            log_start = out.tell()
            popen = subprocess.Popen(
                process.command,
                env={**self._environ, **process.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_follow_parent(os.getpid()),  # noqa: PLW1509 - no threads run in this process
            )
        child = Child(process, popen, log, log_start)
        self._all = [other for other in self._all if not other.exited.done()]
        self._all.append(child)
        return child

    def kill_all(self) -> None:
        for child in self._all:
            child.signal_group(signal.SIGKILL)

    async def all_exited(self) -> None:
        await asyncio.gather(*(child.wait() for child in self._all))

    def _reap(self) -> None:
        for child in self._all:
            child.reap()


def ending(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _follow_parent(parent: int) -> Callable[[], None] | None:
    if _prctl is None:
        return None

    def follow() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return follow
