"""`python -m loadtest gateway --telemetry`: what spans and figures cost, gateways with and without them side by side.

Off: no spans, nothing counted for each token. On: every span made, one trace in a hundred sent by the workers and kept
at infinite speed, all of them paced. Both serve the same load at the same moment on the same cores, so that whatever
else the machine does slows both; a round's cost is the ratio of the CPU time that a request took of each.
"""

import argparse
import asyncio
from typing import Any

from loadtest.micro import bench
from loadtest.micro.gateway import PACED_FACTOR, TokenPath, row_of
from services.launcher.machine import free_ports

NO_LIMIT = 1e6  # traces a second
OFF, ON = "off", "on"
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "free": {OFF: {"telemetry": "off"}, ON: {"trace_ratio": 0.01, "traces_per_s": NO_LIMIT}},
    "paced": {OFF: {"telemetry": "off"}, ON: {"trace_ratio": 1.0, "traces_per_s": NO_LIMIT}},
}
GATEWAY = ("gateway",)
PATH = ("gateway", "prefill", "decode")
COLUMNS = {
    "": 5,
    "clients": 7,
    "req/s each": 18,
    "gateway off": 18,
    "gateway on": 18,
    "gateway cost": 22,
    "path cost": 22,
}


def run(args: argparse.Namespace, refusal: str | None) -> int:
    return bench.command(args, refusal=refusal, work=lambda: _measure(args), table=_text)


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    async with bench.opened() as here:
        here.say("starting NATS, and a gateway with its workers for each variant")
        path = TokenPath(here, args)
        names = [_name(kind, variant) for kind, variants in VARIANTS.items() for variant in variants]
        path.ports = dict(zip(names, free_ports(len(names)), strict=True))
        path.children["nats"], nats_url = await here.nats()
        for kind, variants in VARIANTS.items():
            for variant, settings in variants.items():
                step_ms = args.step_ms if kind == "paced" else 0.0
                path.start_cluster(_name(kind, variant), nats_url, step_ms, **settings)
        for name in names:
            await here.until_probed(path.children[f"gateway {name}"], path.url(name))
        points = [("free", count, args.seconds) for count in args.concurrency]
        points += [("paced", count, args.seconds * PACED_FACTOR) for count in args.streams]
        for number in range(args.rounds):
            here.say(f"round {number + 1} of {args.rounds}")
            for kind, count, seconds in points:
                both = (path.point(_name(kind, variant), "completions", count, seconds) for variant in (OFF, ON))
                await asyncio.gather(*both)
        settings = {name: getattr(args, name) for name in ("rounds", "seconds", "step_ms", "output_tokens")}
        rows = [{"kind": kind, "clients": count, **_figures(path, args, kind, count)} for kind, count, _ in points]
        return bench.result("gateway telemetry", settings, rows=rows)


def _figures(path: TokenPath, args: argparse.Namespace, kind: str, count: int) -> dict[str, bench.Figure]:
    off, on = (
        [row_of(seen, args.output_tokens) for seen in path.seen[_name(kind, variant), "completions", count]]
        for variant in (OFF, ON)
    )
    return {
        "requests_per_s": bench.figure([row["requests_per_s"] for row in off + on]),
        "off_us_per_request": bench.figure([_us_per_request(row, GATEWAY) for row in off]),
        "on_us_per_request": bench.figure([_us_per_request(row, GATEWAY) for row in on]),
        "gateway_cost": _cost(off, on, GATEWAY),
        "path_cost": _cost(off, on, PATH),
    }


def _cost(off: list[dict[str, float]], on: list[dict[str, float]], roles: tuple[str, ...]) -> bench.Figure:
    pairs = zip(off, on, strict=True)
    return bench.figure([_us_per_request(more, roles) / _us_per_request(less, roles) - 1 for less, more in pairs])


def _us_per_request(row: dict[str, float], roles: tuple[str, ...]) -> float:
    return sum(row[f"{role}_us_per_request"] for role in roles)


def _name(kind: str, variant: str) -> str:
    return f"telemetry-{kind}-{variant}"


def _text(found: dict[str, Any]) -> str:
    lines = [
        "CPU time a request takes, in us and as what telemetry adds: median (least to most of the rounds);",
        "free: one trace in 100 is kept; paced: all are. Path: the gateway with both workers.",
        " ".join(f"{title:>{width}}" for title, width in COLUMNS.items()),
    ]
    for row in found["rows"]:
        rate, off, on = (row[name] for name in ("requests_per_s", "off_us_per_request", "on_us_per_request"))
        whole = (f"{one.median:.0f} ({one.low:.0f}-{one.high:.0f})" for one in (rate, off, on))
        costs = (row["gateway_cost"], row["path_cost"])
        shares = (f"{one.median:.1%} ({one.low:.0%} to {one.high:.0%})" for one in costs)
        cells = (row["kind"], str(row["clients"]), *whole, *shares)
        lines.append(" ".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)))
    return "\n".join(lines)
