"""Do the tiers scale apart? Throughput against the workers of one tier, the other one fixed, on the sim engine.

Prefill is offered long prompts and decode long outputs, in a closed loop of so many clients for each worker. What is
counted comes from the cluster itself, between two looks at its counters while the loop runs. Beside it: the CPU that
each kind of process took, which says what the limit is once it is not the tier.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import msgspec
import psutil

from loadtest.cluster.launch import Started, baton, started
from loadtest.cluster.offer import Load, running
from loadtest.load.levels import parsed
from loadtest.machine import machine
from loadtest.report.scale_plot import plot
from loadtest.slo import Slo

WARM_S = 6.0
PATIENT = {"ttft_s": 600, "itl_s": 10}
SETTINGS = {
    "admission": "off",  # nothing is refused: the tier is meant to be full
    "targets": json.dumps(dict.fromkeys(("priority", "default", "flex"), PATIENT)),
    "queue_s": "600",
    "drain_s": "2",
}


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """How one tier is filled. `fixed`: workers of the other one, enough for the most that is offered."""

    workload: str
    unit: str
    clients: int  # for each worker: more than it runs at once
    fixed: int
    sequences: int  # that an engine runs at once


TIERS = {
    "prefill": Tier(workload="long-prompt", unit="prompt tokens/s", clients=6, fixed=2, sequences=64),
    "decode": Tier(workload="long-output", unit="output tokens/s", clients=10, fixed=2, sequences=8),
}


class Point(msgspec.Struct, frozen=True, kw_only=True):
    workers: int
    per_s: float
    linear: float  # share of the first point's throughput for each worker
    cpu: dict[str, float]  # cores, by role; load: the clients
    idle: float  # cores of the machine that nobody used


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    tier: str
    unit: str
    workload: str
    fixed: int
    sim_speed: float
    seconds: float
    cores: int
    points: list[Point]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tier", choices=sorted(TIERS))
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=20.0, help="that are counted, for each point (default 20)")
    parser.add_argument("--sim-speed", type=float, default=0.5, help="of the profile's (default 0.5)")
    parser.add_argument("--out", type=Path, required=True, help="where TIER.json and TIER.svg go")


def run(args: argparse.Namespace) -> int:
    tier = TIERS[args.tier]
    args.out.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    for workers in args.workers:
        points.append(_point(args, tier, workers, points[0] if points else None))
        print(_line(points[-1], tier))
    scale = Scale(
        tier=args.tier,
        unit=tier.unit,
        workload=tier.workload,
        fixed=tier.fixed,
        sim_speed=args.sim_speed,
        seconds=args.seconds,
        cores=machine().cores,
        points=points,
    )
    (args.out / f"{args.tier}.json").write_bytes(msgspec.json.format(msgspec.json.encode(scale), indent=1))
    counted = [(point.workers, point.per_s) for point in points]
    (args.out / f"{args.tier}.svg").write_text(plot(counted, of=f"{args.tier} workers", unit=tier.unit))
    return 0


def _point(args: argparse.Namespace, tier: Tier, workers: int, first: Point | None) -> Point:
    counts = {"prefill": tier.fixed, "decode": tier.fixed, args.tier: workers}
    options = [
        *("--engine", "sim", "--sim-speed", f"{args.sim_speed:g}", "--arrangement", "split"),
        *("--prefill", str(counts["prefill"]), "--decode", str(counts["decode"])),
        *("--engine-arg", f"max_num_seqs={tier.sequences}", "--engine-arg", "max_model_len=8192"),
        *("--arena-gib", "0.5", "--kv-gib", "1"),
    ]
    load = Load(workload=tier.workload, length_scale=1.0, slo=Slo(), retries=0, tail_s=2.0)
    shape = ("--concurrency", str(tier.clients * workers))
    out = args.out / "runs" / f"{args.tier}-{workers}"
    with (
        started(options, SETTINGS) as cluster,
        running(cluster, load, shape, seconds=WARM_S + args.seconds + 60, out=out) as clients,
    ):
        services = json.loads(baton(("status", "--json", "--port", str(cluster.port))))["services"]
        _until_full(cluster, WARM_S)
        before = _look(args.tier, services, clients.pid)
        time.sleep(args.seconds)
        after = _look(args.tier, services, clients.pid)
    took_s = after.at - before.at
    per_s = (after.tokens - before.tokens) / took_s
    share = per_s / workers / (first.per_s / first.workers) if first else 1.0
    return Point(
        workers=workers,
        per_s=per_s,
        linear=share,
        cpu={role: (after.cpu[role] - before.cpu.get(role, 0.0)) / took_s for role in after.cpu},
        idle=(after.idle_s - before.idle_s) / took_s,
    )


class _Look(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    tokens: float
    cpu: dict[str, float]  # seconds so far
    idle_s: float


def _look(tier: str, services: Sequence[Mapping[str, str]], clients: int) -> _Look:
    cpu: dict[str, float] = {"load": _cpu_s(clients)}
    for service in services:
        cpu[service["role"]] = cpu.get(service["role"], 0.0) + _cpu_s(int(service["pid"]))
    return _Look(at=time.monotonic(), tokens=sum(_counted(tier, services)), cpu=cpu, idle_s=psutil.cpu_times().idle)


def _counted(tier: str, services: Sequence[Mapping[str, str]]) -> Iterator[float]:
    role, name = {
        "prefill": ("prefill", "baton_engine_computed_prompt_tokens"),
        "decode": ("gateway", "baton_inter_token_latency_seconds_count"),
    }[tier]
    for service in services:
        if service["role"] == role:
            page = httpx.get(service["metrics_url"], trust_env=False).text
            yield sum(value for found, _, value in parsed(page) if found == name)


def _cpu_s(pid: int) -> float:
    """Of a process and its children, so far."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system
    return total


def _until_full(cluster: Started, warm_s: float) -> None:
    """The clients have begun, and then a while: the first round comes all at once."""
    with httpx.Client(trust_env=False) as client:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            page = client.get(f"{cluster.url}/metrics").text
            if any(name == "baton_active_requests" and value > 0 for name, _, value in parsed(page)):
                break
            time.sleep(0.2)
    time.sleep(warm_s)


def _line(point: Point, tier: Tier) -> str:
    cpu = ", ".join(f"{role} {cores:.2f}" for role, cores in sorted(point.cpu.items()))
    return (
        f"{point.workers:2} workers: {point.per_s:9.0f} {tier.unit}, {point.linear:6.1%} of linear; "
        f"cores: {cpu}, idle {point.idle:.2f}"
    )
