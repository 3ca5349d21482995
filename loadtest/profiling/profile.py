"""Step-time profiles for the sim engine: measured on this machine's own vLLM, or fitted to Splitwise's measurements.

The engine is measured on a grid of prefill, decode and mixed steps in random order, and in turns with it on random
work that is not fitted, which says how far the profile can be trusted.
"""

import argparse
import asyncio
import json
import platform
import random
import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loadtest.machine import machine
from loadtest.profiling import splitwise
from loadtest.profiling.engine_bench import BenchSettings, EngineBench, running_engine
from loadtest.profiling.fit import fit
from loadtest.profiling.scenarios import DECODE_KNOTS, PREFILL_KNOTS, Scenario, grid, held_out, shuffled
from loadtest.profiling.steps import EngineFacts, Step
from shared.errors import BatonError, SettingsError
from shared.worker.host import cores_of
from shared.worker.sim.profile import Profile, Validation

INTERRUPTED = 130  # the exit code of a program that Ctrl-C ended
TURNS = 9  # between what is fitted and what is held out
KINDS = ("prefill", "decode", "mixed")
CONTEXT_GRAIN = 64  # tokens of context a sequence within which decode steps count as equal work


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model folder; with --splitwise llama2-70b or bloom-176b")
    parser.add_argument("--out", type=Path, required=True, help="the profile to write, NAME.json")
    parser.add_argument("--report", type=Path, help="write predicted against measured as markdown")
    measured = parser.add_argument_group("measure this machine's vLLM")
    measured.add_argument("--engine-arg", action="append", default=[], metavar="KEY=VALUE", help="any of vLLM's")
    measured.add_argument("--cores", default="", help="pin to these, e.g. 0 or 0-3 (default: all)")
    measured.add_argument("--kv-gib", type=float, default=2.0, help="the engine's own KV cache on a CPU (default 2)")
    measured.add_argument("--repeats", type=int, default=3, help="of the grid (default 3)")
    measured.add_argument("--held-out", type=int, default=45, help="random scenarios that are not fitted (default 45)")
    measured.add_argument("--seconds", type=float, default=240.0, help="measure no longer than this (default 240)")
    measured.add_argument("--seed", type=int, default=0, help="of order, tokens and what is held out")
    measured.add_argument("--steps", type=Path, help="keep every measured step as JSON lines")
    published = parser.add_argument_group("fit published measurements")
    published.add_argument("--splitwise", type=Path, metavar="FILE", help="Splitwise's perf_model.csv, .gz or not")
    published.add_argument("--hardware", default="h100-80gb", help="default h100-80gb")
    published.add_argument("--tensor-parallel", type=int, default=8, help="default 8")


def run(args: argparse.Namespace) -> int:
    try:
        _check_folders(args)
        profile, report = _published(args) if args.splitwise else asyncio.run(_measured(args))
    except (SettingsError, BatonError) as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    write_profile(args.out, profile)
    print(f"\n{report}\n\n{args.out}")
    if args.report:
        args.report.write_text(f"{report}\n")
    return 0


def _check_folders(args: argparse.Namespace) -> None:
    for flag, path in (("--out", args.out), ("--report", args.report), ("--steps", args.steps)):
        if path and not path.parent.is_dir():
            raise SettingsError(f"{flag} {path}: there is no folder {path.parent}")
        if path and path.is_dir():
            raise SettingsError(f"{flag} {path}: is a folder; name a file in it")
    if args.out.suffix != ".json":
        raise SettingsError(f"--out {args.out}: name it NAME.json, so that it is found as a profile")


def write_profile(path: Path, profile: Profile) -> None:
    """Readable JSON: a field a line, a knot together."""
    text = json.dumps(msgspec.to_builtins(profile), indent=1)
    path.write_text(re.sub(r"\[\s+([-+.\de]+),\s+([-+.\de]+)\s+\]", r"[\1, \2]", text) + "\n")


def _published(args: argparse.Namespace) -> tuple[Profile, str]:
    rows = splitwise.choose(splitwise.read_rows(args.splitwise), args.model, args.hardware, args.tensor_parallel)
    profile, table = splitwise.profile_of(rows, args.out.stem, Progress())
    return profile, f"{profile.hardware}, {profile.model}: {_sentence(profile.validation)}\n\n{table}"


async def _measured(args: argparse.Namespace) -> tuple[Profile, str]:
    if not (Path(args.model) / "config.json").is_file():
        raise SettingsError(f"--model {args.model}: there is no config.json; make a model by: loadtest model FOLDER")
    settings = BenchSettings(
        model=args.model,
        engine_args=_engine_args(args.engine_arg),
        kv_bytes=int(args.kv_gib * 2**30),
        cores=cores_of(args.cores),
    )
    rng = random.Random(args.seed)
    progress = Progress()
    progress("starting vLLM")
    async with running_engine(settings, rng) as bench:
        facts, details = bench.facts, bench.details
        todo, unseen = shuffled(grid(facts), args.repeats, rng), held_out(facts, args.held_out, rng)
        fitted, test = await _play_in_turns(bench, todo, unseen, args.seconds, progress)
    if missing := [kind for kind in KINDS if any(all(step.kind != kind for step in steps) for steps in (fitted, test))]:
        raise SettingsError(f"--seconds {args.seconds:g}: too short, not enough {' and '.join(missing)} steps")
    if args.steps:
        args.steps.write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in (*fitted, *test)))
    profile = _profile(args, facts, details, fitted, test)
    return profile, _report(profile, fitted, test)


async def _play_in_turns(
    bench: EngineBench, todo: Sequence[Scenario], unseen: Sequence[Scenario], seconds: float, progress: "Progress"
) -> tuple[list[Step], list[Step]]:
    """The steps to fit and those to hold out, a few of each in turns: slow spells of the machine fall on both alike."""
    numbers = count(1)
    total = len(todo) + len(unseen)
    until_s = time.monotonic() + seconds

    def began() -> None:
        progress(f"scenario {next(numbers)} of {total}, {seconds + time.monotonic() - until_s:.0f} of {seconds:g} s")

    fitted: list[Step] = []
    test: list[Step] = []
    for turn in range(TURNS):
        fitted += await bench.play(_share(todo, turn), until_s, began)
        test += await bench.play(_share(unseen, turn), until_s, began)
    return fitted, test


def _share(scenarios: Sequence[Scenario], turn: int) -> Sequence[Scenario]:
    return scenarios[turn * len(scenarios) // TURNS : (turn + 1) * len(scenarios) // TURNS]


def _profile(
    args: argparse.Namespace, facts: EngineFacts, details: dict[str, Any], fitted: Sequence[Step], test: Sequence[Step]
) -> Profile:
    terms = fit(fitted, PREFILL_KNOTS, DECODE_KNOTS)
    profile = Profile(
        name=args.out.stem,
        model=Path(args.model).resolve().name,
        hardware=_hardware(),
        source=(
            f"measured {time.strftime('%Y-%m-%d', time.gmtime())} by `{_command(args)}`: "
            f"{len(fitted)} steps of vLLM {details['vllm']}, {details['dtype']}, Python {platform.python_version()}"
        ),
        licence="Apache-2.0",
        kv_bytes_per_token=facts.kv_bytes_per_token,
        max_model_len=facts.max_model_len,
        max_running=facts.max_running,
        token_budget=facts.token_budget,
        **msgspec.structs.asdict(terms),
    )
    errors = np.abs(relative_errors(profile, test))
    validation = Validation(
        steps=len(test),
        median_error=round(float(np.median(errors)), 4),
        p90_error=round(float(np.quantile(errors, 0.9)), 4),
        spread=round(spread(fitted), 4),
        about=f"random lengths, batches and mixtures that were not fitted, seed {args.seed}",
    )
    return msgspec.structs.replace(profile, validation=validation)


def relative_errors(profile: Profile, steps: Sequence[Step]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Predicted over measured, less one."""
    return np.array([profile.step_s(step.prefill, (step.sequences, step.context)) / step.seconds - 1 for step in steps])


def spread(steps: Sequence[Step]) -> float:
    """The median distance of a step from the median of those with equal work; 0 when no work was repeated."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for step in steps:
        grain = step.context // (CONTEXT_GRAIN * max(1, step.sequences))
        groups[(tuple(step.prefill), step.sequences, grain)].append(step.seconds)
    away = [abs(time_s / np.median(times) - 1) for times in groups.values() if len(times) > 2 for time_s in times]
    return float(np.median(away)) if away else 0.0


def _report(profile: Profile, fitted: Sequence[Step], test: Sequence[Step]) -> str:
    lines = [
        f"{profile.hardware}, {profile.model}: {_sentence(profile.validation)}",
        "",
        "| held-out steps | count | measured ms, p10 / median / p90 | median error | p90 error | median, signed |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        steps = [step for step in test if kind in (step.kind, "all")]
        if not steps:
            continue
        low, middle, high = (1e3 * float(np.quantile([s.seconds for s in steps], share)) for share in (0.1, 0.5, 0.9))
        errors = relative_errors(profile, steps)
        lines.append(
            f"| {kind} | {len(steps)} | {low:.1f} / {middle:.1f} / {high:.1f} "
            f"| {100 * np.median(np.abs(errors)):.1f} % | {100 * np.quantile(np.abs(errors), 0.9):.1f} % "
            f"| {100 * np.median(errors):+.1f} % |"
        )
    error = np.median(np.abs(relative_errors(profile, fitted)))
    everything = [*fitted, *test]
    waited_s = sum(step.waited_s for step in everything)
    share = waited_s / (waited_s + sum(step.seconds for step in everything))
    lines += [
        "",
        f"On the {len(fitted)} fitted steps themselves the median error is {100 * error:.1f} %.",
        f"Other processes had the engine's core for {100 * share:.1f} % of the time, which is not counted.",
    ]
    return "\n".join(lines)


def _sentence(validation: Validation | None) -> str:
    if validation is None:
        return "not validated"
    return (
        f"{validation.steps} steps held out, median error {100 * validation.median_error:.1f} %, "
        f"p90 {100 * validation.p90_error:.1f} %; steps of equal work differ by {100 * validation.spread:.1f} %"
    )


def _engine_args(flags: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for flag in flags:
        key, equals, text = flag.partition("=")
        if not (key and equals):
            raise SettingsError(f"--engine-arg {flag}: write it as KEY=VALUE, e.g. --engine-arg max_model_len=4096")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        values[key.replace("-", "_")] = value
    return values


def _command(args: argparse.Namespace) -> str:
    """What to type to measure the same elsewhere; the model by its name."""
    words = ["python", "-m", "loadtest", "profile", "--model", Path(args.model).resolve().name, "--out", args.out.name]
    words += ["--cores", args.cores] if args.cores else []
    for flag in args.engine_arg:
        words += ["--engine-arg", flag]
    return shlex.join(words)


def _hardware() -> str:
    """Of the cores that this process, and so the engine, is pinned to."""
    here = machine()
    return f"{here.cpu}, {here.cores} core{'s' * (here.cores > 1)}"


class Progress:
    """One line that is written over on a terminal; elsewhere a line every few seconds."""

    EVERY_S = 5.0

    def __init__(self) -> None:
        self._shown = 0.0

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._shown > self.EVERY_S:
            self._shown = time.monotonic()
            print(f"{text}", file=sys.stderr, flush=True)
