"""`loadtest placement`: what choosing the workers of one request costs, by how many there are and how busy they are."""

import argparse
import random
import sys
import time
from typing import Any

from loadtest.cluster.stream import percentile
from services.gateway.scheduling.placement import Candidate, Pools, Rules, Wish, place

SIZES = (2, 16, 128, 1000)
BUSY = (0.0, 0.5, 0.95, 1.0)
CALLS = 500
NOW = 100.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9, help="of each row; the median and the range are shown")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    dice = random.Random(args.seed)
    write = sys.stdout.write
    write("microseconds of CPU a placement, median (low to high); half of the workers prefill, half decode\n")
    write(f"{'workers':>8} {'busy':>6} {'split':>22} {'auto':>22} {'least_loaded':>22}\n")
    for size in SIZES:
        for busy in BUSY:
            pools = fleet(size, busy, dice)
            rules = (Rules(arrangement="split"), Rules(arrangement="auto", itl_s=0.1))
            cells = [
                _timed(pools, one, dice, args.rounds)
                for one in (*rules, Rules(arrangement="split", strategy="least_loaded"))
            ]
            write(f"{size:>8} {busy:>6.0%} " + " ".join(f"{cell:>22}" for cell in cells) + "\n")
    return 0


def fleet(size: int, busy: float, dice: random.Random) -> Pools:
    """Half prefill, half decode; `busy`: the share that has no room for more."""
    workers = []
    for number in range(size // 2):
        full = dice.random() < busy
        speeds: dict[str, Any] = {"prompt_s": 0.002, "token_s": dice.uniform(1e-4, 2e-4), "fingerprint": "shape"}
        workers += [
            Candidate(
                id=f"prefill-{number}",
                takes=frozenset({"prefill"}),
                tokens_until=NOW + (1.0 if full else 0.0),
                begins_at=NOW + (1.0 if full else 0.0),
                load=dice.random(),
                **speeds,
            ),
            Candidate(
                id=f"decode-{number}",
                takes=frozenset({"decode"}),
                has_room=not full,
                load=dice.random(),
                step_s=0.02,
                load_s=0.005,
                **speeds,
            ),
        ]
    return Pools(workers)


def _timed(pools: Pools, rules: Rules, dice: random.Random, rounds: int) -> str:
    wish = Wish(tokens=1000, output=100)
    took = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(CALLS):
            place(pools, wish, rules, avoid=(), random=dice, now=NOW)
        took.append((time.process_time() - began) / CALLS * 1e6)
    return f"{percentile(took, 0.5):.1f} ({min(took):.1f} to {max(took):.1f})"
