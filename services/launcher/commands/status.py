"""`baton status`: what runs, as the processes themselves say it. Exit 0 ready, 1 not ready, 2 no cluster."""

import asyncio
import contextlib
import json
from typing import Any

import httpx
import msgspec
import nats
import nats.errors
from nats.aio.msg import Msg

from services.launcher.diagnosis import Samples, problems, summary
from services.launcher.health import NO_ANSWER, probe_client, why_not_ready
from services.launcher.state import ClusterFolder, ClusterRecord, ServiceRecord, lives
from shared import subjects, wire

BEATS_S = 1.0  # workers say what they take five times a second
DEFAULT_TAKES = {"prefill": ["prefill"], "decode": ["decode"]}


def status(folder: ClusterFolder, port: int, *, as_json: bool) -> int:
    record = folder.read()
    if record is None:
        print(json.dumps({"ready": False, "services": []}) if as_json else f"No cluster runs on port {port}.")
        return 2
    seen, beats, page = asyncio.run(_look(record, with_page=not as_json))
    print(json.dumps(seen, indent=2) if as_json else _screen(seen, beats, Samples.read(page)))
    return 0 if seen["ready"] else 1


Seen = tuple[dict[str, Any], dict[str, wire.Heartbeat], str]


async def _look(record: ClusterRecord, *, with_page: bool) -> Seen:
    """What is printed as JSON; the workers' beats; a gateway's metrics page, or nothing."""
    async with probe_client() as client, asyncio.TaskGroup() as group:
        beats_task = group.create_task(_beats(record))
        page_task = group.create_task(_page(client, record.address if with_page else ""))
        state_tasks = [group.create_task(_state(client, service)) for service in record.services]
    beats, states = beats_task.result(), [task.result() for task in state_tasks]
    services = [
        _service(service, state, beats.get(service.id)) for service, state in zip(record.services, states, strict=True)
    ]
    gateways = [service["state"] == "ready" for service in services if service["role"] == "gateway"]
    seen = {
        # A path through the cluster is the gateway's to judge; without a launcher nobody looks after it. While a
        # cluster starts all gateways count; later one that is started again leaves the address to the others.
        "ready": (any if record.started else all)(gateways) and lives(record.pid, record.born),
        "address": record.address,
        "model": record.model,
        "model_path": record.model_path,
        "arrangement": record.arrangement,
        "services": services,
    }
    return seen, beats, page_task.result()


async def _page(client: httpx.AsyncClient, address: str) -> str:
    """From this machine no key is needed."""
    if not address:
        return ""
    try:
        return (await client.get(f"{address}/metrics")).text
    except httpx.HTTPError:
        return ""  # the states say who is not there


def _service(service: ServiceRecord, state: str, beat: wire.Heartbeat | None) -> dict[str, Any]:
    worker = service.role in DEFAULT_TAKES
    takes = DEFAULT_TAKES.get(service.role, [])
    if worker:
        takes = beat.takes if beat else service.settings.get("takes") or takes
    if beat and beat.state == "draining" and state == "ready":
        state = "draining"
    return {
        "role": service.role,
        "id": service.id,
        "pid": service.pid,
        "node": service.node or None,
        "state": state,
        "takes": list(takes),
        "engine": service.settings.get("engine") if worker else None,
        "metrics_url": f"{service.probe_url}/metrics" if service.probe_url else None,
    }


async def _state(client: httpx.AsyncClient, service: ServiceRecord) -> str:
    if not lives(service.pid, service.born):
        # The launcher may be about to start it again.
        return "lost" if service.state in ("ready", "draining", "lost") else service.state
    if not service.probe_url:
        return service.state
    reason = await why_not_ready(client, service.probe_url)
    if reason is None:
        return "ready"
    if service.state == "draining" or "drain" in reason:
        return "draining"
    if reason.startswith("wedged"):
        return "lost"  # its worker ends soon, and is started anew
    return "lost" if reason == NO_ANSWER and service.state == "ready" else "starting"


async def _beats(record: ClusterRecord) -> dict[str, wire.Heartbeat]:
    """The latest heartbeat of each worker, as many as come in BEATS_S."""
    beats: dict[str, wire.Heartbeat] = {}
    workers = {service.id for service in record.services if service.role in DEFAULT_TAKES and service.pid}
    complete = asyncio.Event()

    async def on_beat(message: Msg) -> None:
        with contextlib.suppress(msgspec.DecodeError):
            beat = wire.decode(message.data)
            if isinstance(beat, wire.Heartbeat):
                beats[beat.id] = beat
        if workers <= beats.keys():
            complete.set()

    with contextlib.suppress(OSError, TimeoutError, nats.errors.Error):
        async with asyncio.timeout(BEATS_S):
            client = await nats.connect(record.nats_url, allow_reconnect=False, error_cb=_ignored, connect_timeout=1)
            try:
                await client.subscribe(subjects.all_beats(record.cluster), cb=on_beat)
                await complete.wait()
            finally:
                await client.close()
    return beats


async def _ignored(_: Exception) -> None:
    """A bus that does not answer shows in the states."""


def _screen(seen: dict[str, Any], beats: dict[str, wire.Heartbeat], samples: Samples) -> str:
    """The table, what there is to do, and what is wrong."""
    found = problems(seen, beats, samples)
    if not samples.rows and seen["ready"]:
        found.append("the gateway does not give its metrics: what is above is all that is known")
    verdict = ["", *(f"! {problem}" for problem in found)] if found else ["healthy: nothing is wrong"]
    return "\n".join([_table(seen, beats), *filter(None, [summary(samples)]), *verdict])


def _table(seen: dict[str, Any], beats: dict[str, wire.Heartbeat]) -> str:
    rows = [("ID", "STATE", "PID", "NODE", "TAKES", "RUNS", "WAIT", "KV", "PROMPT TOK/S")]
    rows += [
        (
            row["id"],
            row["state"],
            str(row["pid"] or "-"),
            row["node"] or "-",
            ",".join(row["takes"]) or "-",
            *_load(beats.get(row["id"])),
        )
        for row in seen["services"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ready = "ready" if seen["ready"] else "not ready"
    return "\n".join([f"{seen['model']} at {seen['address']}: {ready}, arrangement {seen['arrangement']}", *lines])


def _load(beat: wire.Heartbeat | None) -> tuple[str, str, str, str]:
    if beat is None or beat.role not in DEFAULT_TAKES:
        return ("-",) * 4
    speed = f"{beat.prefill_tokens_per_s:,.0f}" if beat.prefill_tokens_per_s else "-"
    return str(beat.backlog.running), str(beat.backlog.waiting), f"{beat.kv_usage:.0%}", speed
