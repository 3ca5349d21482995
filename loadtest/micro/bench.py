"""What micro-benchmarks share: processes of their own in a folder of their own, and where figures come from.

Invariant: what is started here ends here, on every way out, Ctrl-C included; nothing outside is needed or touched.
"""

import argparse
import asyncio
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from loadtest import machine
from loadtest.cluster.stream import percentile
from services.launcher.brokers import find_nats, find_redis, until_nats_answers, until_redis_answers
from services.launcher.health import probe_client, until_ready
from services.launcher.machine import LOOPBACK, free_ports
from services.launcher.plan import Process
from services.launcher.processes import Child, Children, ending
from services.launcher.refusal import UserError
from shared.errors import BatonError, SettingsError
from shared.settings import to_environ

START_S = 60.0
STOP_S = 10.0
MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
OURS = ("BATON_", "OTEL_")  # settings of a cluster that runs beside us must not reach the processes measured here
INTERRUPTED = 130
REFUSED = 2  # how services end when their settings are wrong

T = TypeVar("T")


class Failed(Exception):
    """The measurement cannot go on; one line says why."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure over the rounds of a run."""

    median: float
    low: float
    high: float


def figure(values: Sequence[float]) -> Figure:
    """Of at least one value."""
    ranked = sorted(values)
    return Figure(median=percentile(ranked, 0.5), low=ranked[0], high=ranked[-1])


class Bench:
    """The processes of one measurement. Use `opened`."""

    def __init__(self, folder: Path, children: Children) -> None:
        self.folder = folder
        self._children = children
        self._started: list[Child] = []
        self._began_s = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began_s:6.1f} s  {text}", flush=True)

    def start(self, name: str, command: Sequence[str], settings: dict[str, Any] | None = None) -> Child:
        """A process that gets SIGTERM when this one dies in whatever way."""
        process = Process(role="bench", id=name, command=tuple(command))
        child = self._children.start(process, to_environ(settings or {}), self.folder / f"{name}.log")
        self._started.append(child)
        return child

    def python(self, name: str, module: str, *arguments: str, settings: dict[str, Any] | None = None) -> Child:
        return self.start(name, (sys.executable, "-m", module, *arguments), settings)

    async def until(self, child: Child, ready: Awaitable[object]) -> None:
        """Wait until it is ready. Raises UserError or Failed with its last line when it ends before, or is too slow."""
        waiting = asyncio.ensure_future(ready)
        ended = asyncio.ensure_future(child.wait())
        try:
            await asyncio.wait({waiting, ended}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
                return
            how = f"ended with {ending(ended.result())}" if ended.done() else f"was not ready within {START_S:g} s"
            words = f"{child.process.id} {how}: {child.last_words() or 'it said nothing'}"
            raise UserError(words) if ended.done() and ended.result() == REFUSED else Failed(words)
        finally:
            waiting.cancel()
            ended.cancel()

    async def until_probed(self, child: Child, url: str) -> None:
        async with probe_client() as client:
            await self.until(child, until_ready(client, url, lambda _: None))

    async def nats(self) -> tuple[Child, str]:
        """A nats-server set up as the launcher does it, and its url."""
        (port,) = free_ports(1)
        token = secrets.token_hex(16)
        config = self.folder / "nats.conf"
        config.touch(mode=0o600)
        config.write_text(
            f'host: "{LOOPBACK}"\nport: {port}\nmax_payload: {MAX_PAYLOAD_BYTES}\n'
            f'authorization {{ token: "{token}" }}\n'
        )
        child = self.start("nats-0", (find_nats(), "--config", str(config)))
        await self.until(child, until_nats_answers(port))
        return child, f"nats://{token}@{LOOPBACK}:{port}"

    async def redis(self) -> str:
        """A redis-server on a unix socket; returns its url."""
        path = str(self.folder / "redis.sock")
        options = ("--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no", "--dir", str(self.folder))
        child = self.start("redis-0", (find_redis(), *options))
        await self.until(child, until_redis_answers(path))
        return f"unix://{path}"

    def check(self) -> None:
        """Raises Failed when a process has ended by itself."""
        for child in self._started:
            if child.exited.done():
                how = ending(child.exited.result())
                raise Failed(f"{child.process.id} ended with {how}: {child.last_words() or 'it said nothing'}")

    async def stop(self) -> None:
        """The last started first: servers outlive those that use them."""
        try:
            for child in reversed(self._started):
                if not await child.stop(STOP_S):
                    self.say(f"{child.process.id} had to be killed")
        finally:
            self._children.kill_all()


@asynccontextmanager
async def opened() -> AsyncIterator[Bench]:
    """On the main thread of a process without other threads, because it starts processes."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        bench = Bench(Path(folder), Children(environ))
        try:
            yield bench
        except (OSError, EOFError):
            bench.check()  # rather than that a connection broke, say whose process ended
            raise
        finally:
            await bench.stop()


def measure(work: Callable[[], Awaitable[T]]) -> T | int:
    """Run a measurement to its end: its result, or the exit code of one that failed, having said why."""

    async def guarded() -> T:
        task = asyncio.current_task()
        if task is not None:  # SIGINT is the runner's own
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work()

    try:
        return asyncio.run(guarded())
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted: everything that was started has been stopped", file=sys.stderr)
        return INTERRUPTED
    except (UserError, SettingsError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    except (Failed, BatonError, OSError, EOFError) as error:
        print(f"failed: {error or type(error).__name__}", file=sys.stderr)
        return 1


def command(
    args: argparse.Namespace,
    *,
    refusal: str | None,
    work: Callable[[], Awaitable[dict[str, Any]]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """A whole command: refuse or measure, print the table, write `--out`. Returns the exit code."""
    if refusal is not None:
        print(f"refused: {refusal}", file=sys.stderr)
        return REFUSED
    found = measure(work)
    if isinstance(found, int):
        return found
    print(table(found))
    if args.out:
        args.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    return 1 if found.get("errors") else 0


def result(name: str, settings: dict[str, Any], **figures: object) -> dict[str, Any]:
    """With everything that is needed to judge the figures."""
    return {
        "schema": 1,
        "name": name,
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": machine.git(),
        "machine": machine.machine(),
        "load_average": os.getloadavg(),
        "settings": settings,
        **figures,
    }
