"""One tenant floods, another sends one request at a time: what the flood costs the second one's first token.

One cluster; the second tenant is measured alone and beside the flood, in turns. Its TTFT counts from its first send,
refusals and waits before a further attempt included; a request that is refused for good has none, and is told.
"""

import argparse
import contextlib
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from loadtest.cluster import launch, offer, setup
from loadtest.cluster.capacity import Capacity
from loadtest.cluster.fairness_result import MOST_RATIO, Fairness, shared
from loadtest.cluster.launch import Started
from loadtest.cluster.offer import Load
from loadtest.load.progress import started
from loadtest.machine import git, machine
from loadtest.micro.bench import Failed
from loadtest.report import fairness as report
from loadtest.report import page
from loadtest.result import Result
from services.launcher.refusal import UserError

FILE, PAGE = "fairness.json", "fairness.html"
LEAD_S = 5.0  # the flood alone, until its queue stands
FLOOD_SEED, ROUND_SEED = 50_000, 100
TENANTS = ("flood", "single")
KEY = re.compile(r"sk-baton-[A-Za-z0-9_-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    setup.add_arguments(parser)
    parser.add_argument("--flood", type=float, default=3.0, help="what one tenant offers, in capacities; default 3")
    parser.add_argument("--rounds", type=int, default=2, help="of alone and beside")
    parser.add_argument("--admission", choices=("on", "off"), default="on")
    parser.add_argument("--no-keys", action="store_true", help="both are one tenant: what fairness has to beat")


def run(args: argparse.Namespace) -> int:
    return setup.command("fairness", lambda: _measure(args))


def _measure(args: argparse.Namespace) -> int:
    setup.make_folder(args.out)
    began_s, started_at = time.monotonic(), started()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:6.1f} s  {text}", flush=True)

    with contextlib.ExitStack() as stack:
        options = stack.enter_context(setup.up_options(args))
        more, keys = stack.enter_context(_keys(wanted=not args.no_keys))
        say("starting a cluster")
        settings = setup.settings(args, admission=args.admission)
        cluster = stack.enter_context(launch.started([*options, *more], settings))
        flood, single = (msgspec.structs.replace(setup.load(args), key=key) for key in keys)
        capacity = setup.find_capacity(cluster, flood, args, args.out, say)
        bench = _Bench(args, cluster, args.flood * capacity.per_s)
        for number in range(args.rounds):
            bench.alone(number, single)
            say(f"round {number + 1}: alone, TTFT {_told(bench.alones[-1])}")
            bench.beside(number, single, flood)
            say(f"round {number + 1}: beside {bench.rate:.1f} requests/s, TTFT {_told(bench.besides[-1])}")
    return _finish(args, started_at, capacity, bench)


class _Bench:
    """What was found so far."""

    def __init__(self, args: argparse.Namespace, cluster: Started, rate: float) -> None:
        self._args, self._cluster = args, cluster
        self.rate = rate
        self.alones: list[Result] = []
        self.besides: list[Result] = []
        self.floods: list[Result] = []

    def alone(self, number: int, load: Load) -> None:
        self.alones.append(self._single(f"alone-{number + 1}", load, 2 * number))

    def beside(self, number: int, load: Load, flood: Load) -> None:
        args, out = self._args, self._args.out / f"flood-{number + 1}"
        shape = ("--rate", f"{self.rate:g}", "--arrivals", "gamma", "--cv", f"{args.cv:g}")
        longest_s = args.seconds + LEAD_S + args.tail + offer.SPARE_S  # it is told to end before
        cold = msgspec.structs.replace(flood, seed=flood.seed + FLOOD_SEED + number)
        with offer.running(self._cluster, cold, shape, seconds=longest_s, out=out) as process:
            time.sleep(LEAD_S)
            self.besides.append(self._single(f"beside-{number + 1}", load, 2 * number + 1))
            if process.poll() is not None:
                raise Failed(f"the flood ended early: see {out / offer.LOG}")
        self.floods.append(offer.read(out))

    def _single(self, name: str, load: Load, place: int) -> Result:
        cold = msgspec.structs.replace(load, seed=load.seed + ROUND_SEED + place)
        return offer.closed(self._cluster, cold, clients=1, seconds=self._args.seconds, out=self._args.out / name)


def _finish(args: argparse.Namespace, started_at: str, capacity: Capacity, bench: _Bench) -> int:
    alone, beside = shared(bench.alones), shared(bench.besides)
    ratio = _ratio(beside.ttft_s.p95, alone.ttft_s.p95)
    found = Fairness(
        started_at=started_at,
        git=git(),
        machine=machine(),
        settings=setup.described(args),
        target=bench.alones[0].target,
        capacity=capacity,
        flood_per_s=bench.rate,
        alone=alone,
        beside=beside,
        flood=shared(bench.floods),
        ratio_p50=_ratio(beside.ttft_s.p50, alone.ttft_s.p50),
        ratio_p95=ratio,
        met=ratio is not None and ratio <= MOST_RATIO and not beside.refused and not beside.failed,
    )
    setup.write(found, args.out / FILE, page.render(report.page(found)), args.out / PAGE)
    print(report.text(found))
    print(f"{args.out / FILE}\n{args.out / PAGE}")
    return 0


@contextlib.contextmanager
def _keys(*, wanted: bool) -> Iterator[tuple[list[str], list[str]]]:
    """What `baton up` needs, and a key for each tenant; they end with the measurement."""
    if not wanted:
        yield [], [""] * len(TENANTS)
        return
    with tempfile.TemporaryDirectory(prefix="baton-keys-") as folder:
        file = str(Path(folder) / "keys.yaml")
        yield ["--keys", file], [_new_key(tenant, file) for tenant in TENANTS]


def _new_key(tenant: str, file: str) -> str:
    found = KEY.search(launch.baton(("keys", "add", "--tenant", tenant, "--file", file)))
    if found is None:
        raise UserError("baton keys add printed no key")
    return found[0]


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _told(result: Result) -> str:
    told = result.summary.ttft_s
    return ", ".join(
        f"{name} {'-' if value is None else f'{1e3 * value:.0f} ms'}"
        for name, value in (("p50", told.p50), ("p95", told.p95))
    )
