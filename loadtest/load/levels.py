"""Levels of a cluster over time: gauges of the gateway, the workers and the stores, read from their /metrics.

Invariant: what is missing is left out or null; nothing here can fail a run.
"""

import asyncio
import re
import time
from collections.abc import Iterable, Mapping, Sequence

import httpx
import msgspec

from loadtest.result import Column, Levels

EVERY_S = 1.0
SCRAPE_S = 2.0
LINE = re.compile(r"^(baton_[a-z_]+)(?:\{([^}]*)\})? ([-+0-9.eE]+)", re.MULTILINE)
STATE = re.compile(r'state="([^"]*)"')
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')

Sample = tuple[str, str, float]  # name, labels, value


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One service's /metrics. `role`: gateway, prefill, decode or kv."""

    role: str
    id: str
    metrics_url: str


def levels(place: Place, samples: Iterable[Sample]) -> dict[str, float]:
    """What one service says, by the name of its series."""
    read = {"gateway": _gateway, "kv": _kv}.get(place.role)
    if read is not None:
        return read(samples)
    return _worker(place.id, samples) if place.role in ("prefill", "decode") else {}


def parsed(text: str) -> list[Sample]:
    """Baton's gauges and counters of a Prometheus page; what is no number is passed over."""
    return [(name, labels, float(value)) for name, labels, value in LINE.findall(text) if _number(value)]


def engine_facts(text: str) -> dict[str, str]:
    """What a worker's page says of its engine."""
    for name, labels, _ in LINE.findall(text):
        if name == "baton_engine_info":
            return dict(LABEL.findall(labels))
    return {}


def _gateway(samples: Iterable[Sample]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, _, value in samples:
        if name in ("baton_queue_depth", "baton_active_requests"):
            series = name.removeprefix("baton_")
            found[series] = found.get(series, 0.0) + value
    return found


def _kv(samples: Iterable[Sample]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, labels, value in samples:
        state = STATE.search(labels)
        if name == "baton_kv_slots" and state:
            found[f"kv_slots.{state[1]}"] = value
        elif name == "baton_kv_leases":
            found["kv_leases"] = value
    return found


def _worker(worker: str, samples: Iterable[Sample]) -> dict[str, float]:
    series = {
        "baton_engine_running": "running",
        "baton_engine_waiting": "waiting",
        "baton_engine_kv_usage": "engine_kv_usage",
    }
    return {f"{series[name]}.{worker}": value for name, _, value in samples if name in series}


def summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Series that several services have (slots of several nodes) are added up."""
    found: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0.0) + value
    return found


class Sampler:
    """Reads every place once a second until cancelled."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._times_s: list[float] = []
        self._samples: list[dict[str, float]] = []

    async def run(self, start_s: float) -> None:
        if not self._places:
            return
        async with httpx.AsyncClient(timeout=SCRAPE_S, trust_env=False) as client:
            due_s = start_s
            while True:
                at_s = time.monotonic()
                parts = await asyncio.gather(*(self._read(client, place) for place in self._places))
                self._times_s.append(at_s - start_s)
                self._samples.append(summed(parts))
                due_s = max(due_s + EVERY_S, time.monotonic())
                await asyncio.sleep(due_s - time.monotonic())

    def taken(self) -> Levels:
        names = sorted({name for sample in self._samples for name in sample})
        columns: dict[str, Column] = {name: [sample.get(name) for sample in self._samples] for name in names}
        if not columns:
            return Levels()
        return Levels(t_s=[round(at_s, 3) for at_s in self._times_s], series=columns)

    async def _read(self, client: httpx.AsyncClient, place: Place) -> dict[str, float]:
        try:
            answer = await client.get(place.metrics_url)
        except (httpx.HTTPError, httpx.InvalidURL):
            return {}
        return levels(place, parsed(answer.text)) if answer.status_code == 200 else {}


def _number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
