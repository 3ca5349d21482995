"""A split cluster against an unsplit one on the same cores: closed loop, rounds in turns, ratios at the end.

Both clusters run at once; the one that is not measured is idle. Figures of one machine and one run belong together.
"""

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx

from loadtest.cluster.stream import Timing, complete, percentile, random_prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("split", help="address of a cluster started with --arrangement split")
    parser.add_argument("unsplit", help="address of one started with --prefill 0 --decode 2 --arrangement unsplit")
    parser.add_argument("--concurrency", default="1,8", help="comma separated")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=24, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result as JSON")


def run(args: argparse.Namespace) -> int:
    result = asyncio.run(_compare(args))
    print(_table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    return 0


async def _compare(args: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(time.time_ns())
    sides = {"split": args.split, "unsplit": args.unsplit}
    measured: dict[str, Any] = {}
    for concurrency in [int(part) for part in args.concurrency.split(",")]:
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, url in sides.items():
                count = args.requests if number else max(2, concurrency)  # round 0 warms up
                figures = await _round(url, concurrency, count, args, rng)
                if number:
                    rounds[name].append(figures)
                    print(f"c={concurrency} round {number}/{args.rounds} {name:8} {_line(figures)}", flush=True)
        measured[str(concurrency)] = {name: _median(rows) for name, rows in rounds.items()}
    return {
        "schema": 1,
        "prompt_tokens": args.prompt_tokens,
        "output_tokens": args.output_tokens,
        "requests": args.requests,
        "rounds": args.rounds,
        "concurrency": measured,
    }


async def _round(
    url: str, concurrency: int, count: int, args: argparse.Namespace, rng: random.Random
) -> dict[str, float]:
    todo = [random_prompt(args.prompt_tokens, rng) for _ in range(count)]
    done: list[Timing] = []
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def worker() -> None:
            while todo:
                done.append(await complete(client, model, todo.pop(), args.output_tokens))

        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(concurrency):
                tasks.create_task(worker())
        elapsed = time.perf_counter() - started
    gaps = [gap for timing in done for gap in timing.gaps_s]
    return {
        "ttft_p50_ms": 1e3 * percentile([t.ttft_s for t in done], 0.5),
        "itl_p50_ms": 1e3 * percentile(gaps, 0.5),
        "itl_p99_ms": 1e3 * percentile(gaps, 0.99),
        "tokens_per_s": sum(t.tokens for t in done) / elapsed,
    }


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: percentile([row[key] for row in rows], 0.5) for key in rows[0]}


def _line(figures: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.1f}" for key, value in figures.items())


def _table(result: dict[str, Any]) -> str:
    lines = [f"\n{result['prompt_tokens']} prompt and {result['output_tokens']} output tokens, medians of rounds"]
    for concurrency, sides in result["concurrency"].items():
        for name, figures in sides.items():
            lines.append(f"  c={concurrency:3} {name:8} {_line(figures)}")
        ratios = {key: sides["split"][key] / sides["unsplit"][key] for key in sides["split"]}
        lines.append(f"  c={concurrency:3} ratio    {'  '.join(f'{k} {v:.2f}' for k, v in ratios.items())}")
    return "\n".join(lines)
