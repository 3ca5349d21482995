"""`baton tap`: the traffic on the bus, read with plain msgpack, so that it shows what anybody would read there."""

import asyncio
import json
import sys
import time
from typing import Any

import msgpack
import nats
import nats.errors
from nats.aio.msg import Msg

from services.launcher.refusal import UserError
from services.launcher.state import ClusterFolder, ClusterRecord

MOST_TEXT = 200  # characters of one value


def tap(folder: ClusterFolder, port: int, subject: str | None, count: int) -> int:
    record = folder.read()
    if record is None:
        raise UserError(f"no cluster runs on port {port}: start one with baton up --port {port}")
    subject = subject or ">"
    if not subject.startswith((f"{record.cluster}.", "_INBOX", "$")):
        subject = f"{record.cluster}.{subject}"
    try:
        asyncio.run(_print(record, subject, count))
    except (OSError, nats.errors.Error) as error:
        raise UserError(f"the bus does not answer ({type(error).__name__}): see baton status --port {port}") from error
    return 0


async def _print(record: ClusterRecord, subject: str, count: int) -> None:
    client = await nats.connect(record.nats_url, name="tap", connect_timeout=5, max_reconnect_attempts=5)
    enough = asyncio.Event()
    printed = 0

    async def on_message(message: Msg) -> None:
        nonlocal printed
        if not enough.is_set():
            print(line(message.subject, message.data, time.time()))
            sys.stdout.flush()
            printed += 1
        if printed == count:
            enough.set()

    try:
        await client.subscribe(subject, cb=on_message)
        await enough.wait()
    finally:
        await client.close()


def line(subject: str, data: bytes, at: float) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(at)) + f".{int(at % 1 * 1000):03d}"
    return f"{clock} {subject} {_shown(data)}"


def _shown(data: bytes) -> str:
    if not data:
        return "(empty)"
    try:
        return json.dumps(_short(msgpack.unpackb(data)), ensure_ascii=False)
    except (ValueError, msgpack.UnpackException):
        return f"<{len(data)} bytes that are not MessagePack>"


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return f"{value[:MOST_TEXT]}…"
    return value
