"""Runs the launcher as its user does, and looks at what it leaves."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from services.launcher.machine import free_ports

LIMIT_S = 60.0


class Launched:
    """A running `baton up`. Lines of its output come through `until_line`."""

    def __init__(self, popen: "subprocess.Popen[str]") -> None:
        self.popen = popen
        self.pid = popen.pid
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def until_line(self, part: str) -> str:
        deadline = time.monotonic() + LIMIT_S
        while True:
            line = self._new.get(timeout=max(0.1, deadline - time.monotonic()))
            if line is None:
                raise AssertionError(f"it ended before it said {part!r}: {self.lines}")
            if part in line:
                return line

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(LIMIT_S)

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line.rstrip("\n"))
            self._new.put(line)
        self._new.put(None)


class Launches:
    """One test's launcher: its port, its home, its folder of shared memory and what its stand-ins do wrong."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.port = free_ports(1)[0]
        self.home = folder / "home"
        self.shm = folder / "shm"
        self.stand_ins = folder / "stand-ins"
        self.tmp = folder / "tmp"
        for path in (self.shm, self.stand_ins, self.tmp):
            path.mkdir()
        self.model = model
        self.pids: set[int] = set()
        self._running: list[Launched] = []

    def environ(self, **more: str) -> dict[str, str]:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
        return {
            **environ,
            "BATON_HOME": str(self.home),
            "BATON_SHM_DIR": str(self.shm),
            "BATON_DRAIN_S": "2",
            "STAND_IN_FOLDER": str(self.stand_ins),
            "TMPDIR": str(self.tmp),
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    def command(self, name: str, *args: str) -> list[str]:
        more = ["--model", str(self.model), "--arena-gib", "0.01"] if name == "up" else []
        port = ["--port", str(self.port)]
        return [sys.executable, "-m", "tests.support.stand_in_launcher", name, *port, *more, *args]

    def run(self, name: str, *args: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(name, *args),
            env=self.environ(**environ),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def up(self, *args: str, **environ: str) -> Launched:
        popen = subprocess.Popen(
            self.command("up", *args),
            env=self.environ(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        launched = Launched(popen)
        self._running.append(launched)
        return launched

    def ready(self, *args: str, **environ: str) -> Launched:
        launched = self.up(*args, **environ)
        launched.until_line("stop  ")
        self.remember()
        return launched

    def status(self) -> tuple[int, dict[str, Any]]:
        done = self.run("status", "--json")
        return done.returncode, json.loads(done.stdout)

    def remember(self) -> None:
        """Every process there is now, to be looked for at the end."""
        _, seen = self.status()
        self.pids |= {service["pid"] for service in seen["services"]} - {0}
        for file in self.stand_ins.glob("*.pids"):
            self.pids |= {int(pid) for pid in file.read_text().split()}

    def pids_of(self, service_id: str) -> list[int]:
        return [int(pid) for pid in (self.stand_ins / f"{service_id}.pids").read_text().split()]

    def left(self) -> list[str]:
        """Processes, sockets and shared memory that should be gone."""
        alive = [f"process {pid}" for pid in self.pids if _alive(pid)]
        files = [str(path) for folder in (self.shm, self.tmp) for path in folder.rglob("*")]
        record = self.home / str(self.port) / "cluster.json"
        return [*alive, *files, *([str(record)] if record.exists() else [])]

    def close(self) -> None:
        for launched in self._running:
            if launched.popen.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    launched.popen.kill()
                launched.popen.wait()
        self.run("down")


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something that nothing announces."""
    deadline = time.monotonic() + LIMIT_S
    turn = threading.Event()
    while not true():
        assert time.monotonic() < deadline, f"not within {LIMIT_S:.0f} s: {what}"
        turn.wait(0.05)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def launches(folder: Path, model: Path) -> Iterator[Launches]:
    found = Launches(folder, model)
    try:
        yield found
    finally:
        found.close()
