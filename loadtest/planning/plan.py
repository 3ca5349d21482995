"""`python -m loadtest plan WORKLOAD|TRACE --rate R --profile P`: how many prefill and decode workers that load needs.

Nothing is started: the load goes through a model of the tiers (fleet.py) on a profile's measured step times. The answer
is where to begin; `run` against the real fleet says what is true. Exit 0 found, 1 no such fleet, 2 refused in one line.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from loadtest.load import arrivals, trace
from loadtest.load.conversation import Source
from loadtest.load.options import add_load, find_source
from loadtest.load.progress import say
from loadtest.planning.demand import Demand, demands
from loadtest.planning.fleet import Fleet, Served, serve
from loadtest.planning.search import Goal, smallest
from loadtest.slo import Slo, percentile
from shared.errors import SettingsError
from shared.worker.sim.profile import Profile, load_profile, shipped

NO_FLEET, REFUSED = 1, 2
SECONDS = 120.0
MIN_REQUESTS = 50
GIB = 1 << 30
PROGRESS_S = 2.0


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One arrangement's smallest fleet. Times in seconds."""

    prefill: int
    decode: int
    good: float
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    prefill_busy: float
    decode_busy: float
    kv_gib: float  # of running sequences, at most, in one worker that decodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_load(parser)
    add = parser.add_argument
    add("--profile", required=True, help=f"step times: {', '.join(shipped())}, or a file of `loadtest profile`")
    add("--rate", type=float, help="requests (with turns: sessions) a second; a trace has its own")
    add("--seconds", type=float, help=f"of load (default {SECONDS:g}, of a trace all)")
    add("--seed", type=int, default=0)
    add("--length-scale", type=float, default=1.0, help="of all lengths, in tokens")
    add("--time-scale", type=float, default=1.0, help="of a trace; 2 is twice as fast")
    add("--cached-share", type=float, default=0.0, help="of prompt tokens that prefix hits save (default 0)")
    add("--link-gbit", type=float, default=100.0, help="between a prefill and a decode worker (default 100)")
    add("--slo-ttft", type=float, default=2.0, metavar="S")
    add("--slo-itl", type=float, default=0.1, metavar="S")
    add("--slo-itl-share", type=float, default=0.95, help="of a request's gaps")
    add("--good", type=float, default=0.9, metavar="SHARE", help="of requests within both targets (default 0.9)")
    add("--max-workers", type=int, default=256)
    add("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    try:
        _check(args)
        profile = load_profile(args.profile)
        load = _demands(args, profile)
        slo = Slo(ttft_s=args.slo_ttft, itl_s=args.slo_itl, itl_share=args.slo_itl_share)
        _refuse_what_no_fleet_does(load, profile, slo)
    except SettingsError as error:
        sys.stderr.write(f"loadtest plan: {error}\n")
        return REFUSED
    goal = Goal(slo=slo, good_share=args.good, max_workers=args.max_workers)
    tries = _Tries(load, profile, slo, args.link_gbit * 1e9 / 8, quiet=args.json)
    found = {name: smallest(tries, goal, split=name == "split") for name in ("split", "unsplit")}
    plans = {name: None if one is None else _planned(*one, profile) for name, one in found.items()}
    if args.json:
        print(json.dumps({"requests": len(load), **{name: msgspec.to_builtins(one) for name, one in plans.items()}}))
    else:
        _show(args, profile, load, plans)
    return 0 if plans["split"] or plans["unsplit"] else NO_FLEET


class _Tries:
    """Remembers what was tried, and says what is being tried when that takes long."""

    def __init__(self, load: Sequence[Demand], profile: Profile, slo: Slo, link_bytes_s: float, *, quiet: bool) -> None:
        self._load, self._profile, self._slo, self._link_bytes_s = load, profile, slo, link_bytes_s
        self._quiet = quiet
        self._told_at = time.monotonic()
        self._known: dict[Fleet, Served] = {}  # of one search: as many as it tries

    def __call__(self, fleet: Fleet) -> Served:
        if fleet not in self._known:
            if not self._quiet and time.monotonic() - self._told_at > PROGRESS_S:
                self._told_at = time.monotonic()
                say(f"trying {_workers(fleet.prefill, fleet.decode)} ...")
            self._known[fleet] = serve(self._load, self._profile, fleet, self._slo, self._link_bytes_s)
        return self._known[fleet]


def _check(args: argparse.Namespace) -> None:
    for name in ("rate", "seconds", "length_scale", "time_scale", "link_gbit", "slo_ttft", "slo_itl", "max_workers"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise SettingsError(f"--{name.replace('_', '-')}: must be more than 0")
    for name in ("slo_itl_share", "good"):
        if not 0 < getattr(args, name) <= 1:
            raise SettingsError(f"--{name.replace('_', '-')}: a share above 0, at most 1")
    if not 0 <= args.cached_share < 1:
        raise SettingsError("--cached-share: from 0, below 1")


def _demands(args: argparse.Namespace, profile: Profile) -> list[Demand]:
    window = trace.Window(time_scale=args.time_scale, length_scale=args.length_scale)
    source = find_source(args.load, window, seed=args.seed)
    found = demands(
        source,
        _arrivals(args, source),
        room_tokens=profile.max_model_len,
        cached_share=args.cached_share,
        pace_s=args.slo_itl,
    )
    if len(found) < MIN_REQUESTS:
        raise SettingsError(
            f"--rate, --seconds: {len(found)} requests say too little; give more of one ({MIN_REQUESTS} at least)"
        )
    return found


def _arrivals(args: argparse.Namespace, source: Source) -> Sequence[float]:
    if args.rate is not None:
        shape = arrivals.Shape(rate=args.rate)
        seconds = SECONDS if args.seconds is None else args.seconds
        times: list[float] = arrivals.drawn(shape, args.seed, seconds=seconds, requests=source.size).tolist()
        return times
    if source.arrivals_s is None:
        raise SettingsError(f"{source.name} has no arrivals of its own: give --rate R")
    until_s = float("inf") if args.seconds is None else args.seconds
    return list(itertools.takewhile(lambda at_s: at_s < until_s, source.arrivals_s))


def _refuse_what_no_fleet_does(load: Sequence[Demand], profile: Profile, slo: Slo) -> None:
    """What one request alone takes, on idle workers."""
    middle = sorted(load, key=lambda one: one.prompt_tokens)[len(load) // 2]
    step_s = profile.step_s([], (1, middle.prompt_tokens))
    if step_s > slo.itl_s:
        raise SettingsError(
            f"--slo-itl {slo.itl_s:g}: one sequence alone takes {step_s:.3f} s a token on {profile.name}"
        )
    prompt_s = profile.step_s([(middle.prompt_tokens - middle.cached_tokens, middle.cached_tokens)])
    if prompt_s > slo.ttft_s:
        raise SettingsError(
            f"--slo-ttft {slo.ttft_s:g}: the middle prompt, {middle.prompt_tokens} tokens, alone takes "
            f"{prompt_s:.2f} s on {profile.name}"
        )


def _planned(fleet: Fleet, served: Served, profile: Profile) -> Planned:
    return Planned(
        prefill=fleet.prefill,
        decode=fleet.decode,
        good=round(float(np.mean(served.good)), 4),
        ttft_p50_s=percentile(served.ttft_s, 0.5),
        ttft_p95_s=percentile(served.ttft_s, 0.95),
        prefill_busy=round(served.prefill_busy, 4),
        decode_busy=round(served.decode_busy, 4),
        kv_gib=round(served.kv_tokens * profile.kv_bytes_per_token / GIB, 3),
    )


def _show(args: argparse.Namespace, profile: Profile, load: Sequence[Demand], plans: dict[str, Planned | None]) -> None:
    seconds = load[-1].at_s or 1.0
    prompt = sum(one.prompt_tokens for one in load) / len(load)
    output = sum(one.output_tokens for one in load) / len(load)
    print(f"{Path(args.load).name}: {len(load) / seconds:.3g} requests/s, {prompt:.0f} prompt and {output:.0f} output")
    print(
        f"tokens each, on {profile.name} ({profile.hardware}); {args.good:.0%} within {args.slo_ttft:g} s to the first"
    )
    print(f"token and {args.slo_itl:g} s between tokens:\n")
    for name, plan in plans.items():
        if plan is None:
            print(f"  {name:8} not with {args.max_workers} workers")
            continue
        ttft = f"first token p50 {plan.ttft_p50_s or 0:.2f} s, p95 {plan.ttft_p95_s or 0:.2f} s"
        busy = f"decode {plan.decode_busy:.0%}"
        if plan.prefill:
            busy = f"prefill {plan.prefill_busy:.0%}, {busy}"
        print(f"  {name:8} {_workers(plan.prefill, plan.decode)}: {plan.good:.1%} good, {ttft}")
        print(f"  {'':8} busy: {busy}; up to {plan.kv_gib:.3g} GiB of KV in one worker")
    print("\nWithout the ways over the network, preemption, or failures: begin here, and measure with `run`.")


def _workers(prefill: int, decode: int) -> str:
    return f"{prefill} prefill + {decode} decode" if prefill else f"{decode} workers"
