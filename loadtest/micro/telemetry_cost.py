"""`python -m loadtest gateway --telemetry`: the token path with telemetry off and on, point by point in turns.

Off: no spans, nothing counted for each token. On: every span made, one trace in a hundred sent by the workers and kept
at infinite speed, all of them paced. The order changes with every round: a drift of the machine hits both alike.
"""

import argparse
from typing import Any

from loadtest.micro import bench
from loadtest.micro.bench import Figure
from loadtest.micro.gateway import PACED_FACTOR, TokenPath, figures_of
from services.launcher.machine import free_ports

NO_LIMIT = 1e6  # traces a second
OFF = {"telemetry": "off"}
FEW = {"trace_ratio": 0.01, "traces_per_s": NO_LIMIT}
ALL = {"trace_ratio": 1.0, "traces_per_s": NO_LIMIT}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "free": {"off": OFF, "1 in 100": FEW},
    "paced": {"off": OFF, "all": ALL},
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
        for number in range(args.rounds):
            here.say(f"round {number + 1} of {args.rounds}")
            await _round(path, args, number)
        points = {"free": args.concurrency, "paced": args.streams}
        rows = [
            {
                "kind": kind,
                "telemetry": variant,
                "clients": count,
                **figures_of(
                    path.seen[_name(kind, variant), "completions", count],
                    args,
                    ideal_per_s=1e3 * count / args.step_ms if kind == "paced" else 0.0,
                ),
            }
            for kind, variants in VARIANTS.items()
            for count in points[kind]
            for variant in variants
        ]
        settings = {name: getattr(args, name) for name in ("rounds", "seconds", "step_ms", "output_tokens")}
        return bench.result("gateway telemetry", settings, rows=rows)


async def _round(path: TokenPath, args: argparse.Namespace, number: int) -> None:
    for kind, counts, seconds in (
        ("free", args.concurrency, args.seconds),
        ("paced", args.streams, args.seconds * PACED_FACTOR),
    ):
        variants = list(VARIANTS[kind])
        for count in counts:
            for variant in variants if number % 2 else variants[::-1]:
                await path.point(_name(kind, variant), "completions", count, seconds)


def _name(kind: str, variant: str) -> str:
    return f"telemetry-{kind}-{variant.replace(' ', '-')}"


def _text(found: dict[str, Any]) -> str:
    lines = [
        f"{'':6} {'clients':>7} {'telemetry':>10} {'req/s':>22} {'gateway us/req':>18} {'of ideal':>9} {'cost':>8}"
    ]
    base: Figure | None = None
    for row in found["rows"]:
        rate, cpu = row["requests_per_s"], row["gateway_us_per_request"]
        if row["telemetry"] == "off":
            base = cpu if row["kind"] == "paced" else rate
        cost = 0.0
        if base is not None:
            # Paced, streams come as fast as they come; what changes is the CPU time that they take.
            cost = cpu.median / base.median - 1 if row["kind"] == "paced" else 1 - rate.median / base.median
        ideal = f"{row['share_of_ideal'].median:9.3f}" if "share_of_ideal" in row else f"{'':9}"
        rates = f"{rate.median:.0f} ({rate.low:.0f}-{rate.high:.0f})"
        cpus = f"{cpu.median:.0f} ({cpu.low:.0f}-{cpu.high:.0f})"
        told = "" if row["telemetry"] == "off" else f"{cost:8.1%}"
        lines.append(
            f"{row['kind']:6} {row['clients']:7} {row['telemetry']:>10} {rates:>22} {cpus:>18} {ideal} {told:>8}"
        )
    return "\n".join(lines)
