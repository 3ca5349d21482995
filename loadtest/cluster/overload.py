"""More load than a cluster can serve, with admission and without: what is still good, and what refusals are worth.

Two clusters of the same kind run at once and are loaded in turns; the one that is not measured is idle. Capacity is
found first, on the one without admission; then multiples of it are offered in an open loop of bursts, whose clients
try again as the official client does. Every run's own result lies beside the summary and can be reported by itself.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Sequence

import msgspec

from loadtest.cluster import judge, launch, offer, setup
from loadtest.cluster.capacity import Capacity
from loadtest.cluster.judge import Point
from loadtest.cluster.launch import Started
from loadtest.cluster.overload_result import Overload, Side, checks
from loadtest.load.progress import started
from loadtest.machine import git, machine
from loadtest.report import overload as report
from loadtest.report import page
from loadtest.result import Target

FILE, PAGE = "overload.json", "overload.html"
SIDES: dict[str, dict[str, str]] = {"on": {"admission": "on"}, "off": {"admission": "off"}}
LOADS = [0.5, 1.0, 2.0, 4.0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    setup.add_arguments(parser)
    parser.add_argument("--loads", type=_loads, default=LOADS, help="multiples of the capacity; default 0.5,1,2,4")
    parser.add_argument(
        "--sides", type=_sides, default=list(SIDES), help="of admission, the first leads; default on,off"
    )


def run(args: argparse.Namespace) -> int:
    return setup.command("overload", lambda: _measure(args))


def _measure(args: argparse.Namespace) -> int:
    setup.make_folder(args.out)
    bench = _Bench(args)
    with contextlib.ExitStack() as stack:
        options = stack.enter_context(setup.up_options(args))
        clusters = {}
        for name in args.sides:
            bench.say(f"starting a cluster with admission {name}")
            clusters[name] = stack.enter_context(launch.started(options, bench.settings(name)))
        found = setup.find_capacity(clusters[args.sides[-1]], bench.asked, args, args.out, bench.say)
        bench.say(f"capacity: {found.per_s:.2f} good requests/s ({found.how})")
        for number, load in enumerate(args.loads):
            # In turns, and in turns who begins: what the machine does meanwhile falls on both.
            for name in args.sides if number % 2 == 0 else reversed(args.sides):
                bench.point(clusters[name], name, load, load * found.per_s)
    return bench.finish(found)


class _Bench:
    """What is measured, and what was found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.asked = setup.load(args)
        self._args = args
        self._points: dict[str, dict[float, Point]] = {name: {} for name in args.sides}
        self._targets: dict[str, Target] = {}
        self._began_s = time.monotonic()
        self._started_at = started()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began_s:6.1f} s  {text}", flush=True)

    def settings(self, side: str) -> dict[str, str]:
        return setup.settings(self._args, **SIDES[side])

    def point(self, cluster: Started, side: str, load: float, rate: float) -> None:
        args = self._args
        out = args.out / f"{side}-{load:g}x"
        seconds = setup.whole(args.seconds)
        # The same arrivals and prompts on both sides, and prompts that no earlier load has left in a cache.
        cold = msgspec.structs.replace(self.asked, seed=self.asked.seed + 1 + args.loads.index(load))
        result = offer.bursts(cluster, cold, rate=rate, cv=args.cv, seconds=seconds, out=out)
        found = judge.judge(result, setup.window(args.seconds))
        self._points[side][load] = found
        self._targets[side] = result.target
        self.say(
            f"admission {side:3}, {load:g} x: offered {found.offered_per_s:.2f}/s, good {found.good_per_s:.2f}/s, "
            f"{_percent(found.within)} of admitted in time, {found.refusals.count} refusals"
        )

    def finish(self, capacity: Capacity) -> int:
        args = self._args
        sides = [
            Side(
                name=f"admission {name}",
                settings=self.settings(name),
                target=self._targets[name],
                points=[points[load] for load in args.loads],
            )
            for name, points in self._points.items()
        ]
        found = Overload(
            started_at=self._started_at,
            git=git(),
            machine=machine(),
            settings=setup.described(args),
            slo=self.asked.slo,
            capacity=capacity,
            loads=args.loads,
            sides=sides,
            checks=checks(sides),
        )
        setup.write(found, args.out / FILE, page.render(report.page(found)), args.out / PAGE)
        print(report.text(found))
        print(f"{args.out / FILE}\n{args.out / PAGE}")
        return 0


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _loads(text: str) -> list[float]:
    """What this raises, argparse reports with the option."""
    found = sorted(float(part) for part in text.split(","))
    if not all(0 < load < math.inf for load in found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: different multiples above 0, such as 0.5,1,2,4")
    return found


def _sides(text: str) -> Sequence[str]:
    found = text.split(",")
    if not set(found) <= set(SIDES) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: on, off, or on,off")
    return found
