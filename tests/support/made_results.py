"""Results of load-test runs that nobody ran: plausible, seeded, and as ugly as asked, in the shape of result.json."""

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

SLO = {"ttft_s": 2.0, "itl_s": 0.1, "itl_share": 0.95}


class _Made(NamedTuple):
    seconds: float
    slow: float
    shed_share: float
    error_share: float
    null_share: float
    late_s: float


def made_result(
    *,
    requests: int = 400,
    seconds: float = 60.0,
    seed: int = 1,
    slow: float = 1.0,  # all latencies times this
    shed_share: float = 0.0,
    error_share: float = 0.0,
    stages: bool = True,
    null_share: float = 0.0,  # of the optional values that are missing
    late_s: float = 0.0003,  # how late the generator sends
    name: str = "chat",
    engine: str = "sim",
    arrangement: str = "split",
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    rng = random.Random(seed)
    intended_s = sorted(rng.uniform(0, seconds) for _ in range(requests))
    made = _Made(seconds, slow, shed_share, error_share, null_share, late_s)
    rows = [_row(rng, at_s, made) for at_s in intended_s]
    columns = {key: [row[key] for row in rows] for key in _row(rng, 0.0, made) if key != "stages"}
    names = ("edge", "queue", "reserve", "prefill", "handoff") if stages else ()
    columns["stages"] = {stage: [row["stages"].get(stage) for row in rows] for stage in names}
    return {
        "schema": 1,
        "name": name,
        "started_at": "2026-03-04T05:06:07Z",
        "duration_s": seconds,
        "git": {"revision": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "machine": {
            "cpu": "Example CPU @ 2.90GHz",
            "cores": 2,
            "memory_gib": 24.0,
            "platform": "Linux",
            "python": "3.11.2",
        },
        "target": {
            "url": "http://127.0.0.1:8000",
            "model": "demo",
            "engine": engine,
            "profile": "llama2-70b-h100" if engine == "sim" else "",
            "arrangement": arrangement,
            "workers": {"prefill": 1, "decode": 2},
        },
        "settings": {
            "command": ["python", "-m", "loadtest", "run", name, "--rate", "8", "--seconds", f"{seconds:g}"],
            "rate": 8.0,
            "arrivals": "poisson",
            "source": {"prompt_tokens": {"median": 512, "sigma": 0.8}, "output_tokens": {"choice": [64, 128]}},
            **(settings or {}),
        },
        "slo": SLO,
        "summary": _summary(columns, seconds),
        "requests": columns,
        "timeline": _timeline(columns, seconds),
        "levels": _levels(rng, seconds, slow),
        "client": {
            "processes": 1,
            "cpu_share": 0.31,
            "lateness_s": {"p50": late_s / 2, "p99": late_s, "max": 3 * late_s},
            "rejected_by_client": 0,
        },
    }


def write_result(folder: Path, result: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def _row(rng: random.Random, at_s: float, made: _Made) -> dict[str, Any]:
    hump = 1 + 4 * math.exp(-(((at_s - made.seconds * 0.6) / (made.seconds * 0.07 + 1e-9)) ** 2))
    draw = rng.random()
    outcome = "shed" if draw < made.shed_share else "error" if draw < made.shed_share + made.error_share else "ok"
    stages = {
        "edge": 0.002,
        "queue": made.slow * rng.expovariate(20) * hump,
        "reserve": made.slow * rng.uniform(0.001, 0.004),
        "prefill": made.slow * rng.lognormvariate(-2.2, 0.4) * hump**0.5,
        "handoff": made.slow * rng.uniform(0.005, 0.02),
    }
    ttft_s = sum(stages.values()) + made.slow * rng.uniform(0.01, 0.03)
    gap_s, output = made.slow * rng.lognormvariate(-3.6, 0.25), rng.choice([64, 128])
    ok = outcome == "ok"
    known = ok and rng.random() >= made.null_share
    return {
        "intended_s": at_s,
        "sent_s": at_s + rng.uniform(0, made.late_s) if known or not ok else None,
        "ttft_s": ttft_s if ok else None,
        "end_s": at_s + ttft_s + gap_s * output if ok else at_s + 0.02,
        "prompt_tokens": rng.randint(100, 1500) if known else None,
        "output_tokens": output if known else None,
        "cached_tokens": 64 if known else None,
        "outcome": outcome,
        "status": {"ok": 200, "shed": 429, "error": 500}[outcome],
        "code": {"ok": "", "shed": rng.choice(["queue_full", "kv_memory"]), "error": "worker_lost"}[outcome],
        "attempts": 1,
        "path": "split" if ok else "",
        "retries": 0 if known else None,
        "itl_p50_s": gap_s if known else None,
        "itl_p99_s": gap_s * rng.uniform(1.5, 4) if known else None,
        "itl_max_s": gap_s * 4 if known else None,
        "good": ok and ttft_s <= SLO["ttft_s"] and gap_s <= 0.06,
        "stages": stages if known else {},
    }


def _rank(values: list[float], at: float) -> float | None:
    ordered = sorted(values)
    return ordered[max(0, math.ceil(at * len(ordered)) - 1)] if ordered else None


def _spread(values: list[float]) -> dict[str, float | None]:
    levels = {f"p{level}": _rank(values, level / 100) for level in (50, 90, 95, 99)}
    return levels | {"max": max(values, default=None), "mean": sum(values) / len(values) if values else None}


def _known(column: list[Any]) -> list[Any]:
    return [value for value in column if value is not None]


def _counts(values: list[Any]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(_known(values))}


def _summary(columns: dict[str, Any], seconds: float) -> dict[str, Any]:
    offered = len(columns["intended_s"])
    ok = [place for place, outcome in enumerate(columns["outcome"]) if outcome == "ok"]
    good, tokens = sum(columns["good"]), sum(_known(columns["output_tokens"]))
    codes = list(zip(columns["outcome"], columns["code"], strict=True))
    return {
        "offered": offered,
        "completed": len(ok),
        "good": good,
        "goodput_per_s": good / seconds,
        "good_share": good / offered if offered else None,
        "requests_per_s": len(ok) / seconds,
        "output_tokens_per_s": tokens / seconds,
        "ttft_s": _spread([columns["ttft_s"][place] for place in ok]),
        "itl_s": _spread(_known(columns["itl_p50_s"])),
        "e2e_s": _spread([columns["end_s"][place] - columns["intended_s"][place] for place in ok]),
        "outcomes": _counts(columns["outcome"]),
        "shed": _counts([code for outcome, code in codes if outcome == "shed"]),
        "errors": _counts([code for outcome, code in codes if outcome == "error"]),
        "cached_tokens": sum(_known(columns["cached_tokens"])),
        "prompt_tokens": sum(_known(columns["prompt_tokens"])),
        "output_tokens": tokens,
    }


def _timeline(columns: dict[str, Any], seconds: float) -> dict[str, Any]:
    cells = max(1, math.ceil(seconds))
    buckets: list[list[int]] = [[] for _ in range(cells)]
    for place, at_s in enumerate(columns["intended_s"]):
        buckets[min(cells - 1, int(at_s))].append(place)

    def number(test: Any) -> list[int]:
        return [sum(1 for place in bucket if test(place)) for bucket in buckets]

    def rank(column: str, at: float) -> list[float | None]:
        return [_rank(_known([columns[column][place] for place in bucket]), at) for bucket in buckets]

    outcome = columns["outcome"]
    return {
        "bucket_s": 1.0,
        "t_s": [float(cell) for cell in range(cells)],
        "offered": [len(bucket) for bucket in buckets],
        "completed": number(lambda place: outcome[place] == "ok"),
        "good": number(lambda place: columns["good"][place]),
        "shed": number(lambda place: outcome[place] == "shed"),
        "failed": number(lambda place: outcome[place] == "error"),
        "tokens": [sum(_known([columns["output_tokens"][place] for place in bucket])) for bucket in buckets],
        **{f"ttft_p{level}_s": rank("ttft_s", level / 100) for level in (50, 90, 99)},
        **{f"itl_p{level}_s": rank("itl_p50_s", level / 100) for level in (50, 99)},
    }


def _levels(rng: random.Random, seconds: float, slow: float) -> dict[str, Any]:
    times_s = [float(second) for second in range(max(1, math.ceil(seconds)))]

    def wave(height: float) -> list[float]:
        return [round(height * (1 + math.sin(at_s / 9)) * rng.uniform(0.8, 1.2)) for at_s in times_s]

    pinned, cached = wave(40 * slow), wave(90)
    series: dict[str, list[float | None]] = {
        "queue_depth": wave(4 * slow),
        "active_requests": wave(12 * slow),
        "kv_slots.free": [600 - p - c for p, c in zip(pinned, cached, strict=True)],
        "kv_slots.pinned": pinned,
        "kv_slots.cached": cached,
        "kv_leases": wave(6),
    }
    for worker in ("prefill-0", "decode-0", "decode-1"):
        series[f"running.{worker}"] = wave(5 * slow)
        series[f"waiting.{worker}"] = wave(1)
        series[f"engine_kv_usage.{worker}"] = [min(1.0, value / 100) for value in wave(30)]
    return {"t_s": times_s, "series": series}
