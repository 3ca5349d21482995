"""Profiles of real GPUs from the measurements published with Splitwise (github.com/Mutinifni/splitwise-sim, MIT).

A row is one run of a whole batch: `batch_size` prompts of `prompt_size` tokens prefilled together take `prompt_time`
ms, then every step that gives each of them a token takes `token_time` ms. That reading is what the data bear out:
`prompt_time + (token_size - 1) x token_time` is `e2e_time`, and eight prompts of 512 tokens take what one of 4,096
takes. So a row is one prefill step and one decode step.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from loadtest.profiling.fit import Terms, fit
from loadtest.profiling.steps import Step
from shared.errors import SettingsError
from shared.worker.sim.profile import Profile, Validation

PREFILL_KNOTS = [128 << power for power in range(9)]
DECODE_KNOTS = [1 << power for power in range(7)]
LICENCE = "MIT, from github.com/Mutinifni/splitwise-sim"
KV_BYTES_PER_TOKEN = {
    "llama2-70b": 80 * 8 * 128 * 2 * 2,  # layers, KV heads (grouped), head size, K and V, two bytes
    "bloom-176b": 70 * 14336 * 2 * 2,  # layers, all heads together, K and V, two bytes
}
MAX_MODEL_LEN = 16384  # the longest measured prompt and the longest measured output
MAX_RUNNING = 256
TOKEN_BUDGET = 2048  # beyond it the measured times leave the straight line, so nobody runs larger steps


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the file; times in ms."""

    model: str
    hardware: str
    tensor_parallel: int
    prompt_size: int
    batch_size: int
    prompt_time: float
    token_time: float
    e2e_time: float

    @property
    def combination(self) -> tuple[int, int]:
        return self.prompt_size, self.batch_size

    def steps(self) -> tuple[Step, Step]:
        """The prefill of the whole batch, and a decode step halfway through the output.

        The output's length follows from the times: some runs end before `token_size`.
        """
        output = max(1.0, (self.e2e_time - self.prompt_time) / self.token_time)
        context = round(self.batch_size * (self.prompt_size + output / 2))
        return (
            Step(seconds=self.prompt_time / 1e3, prefill=[(self.prompt_size, 0)] * self.batch_size),
            Step(seconds=self.token_time / 1e3, sequences=self.batch_size, context=context),
        )


def read_rows(path: Path) -> list[Row]:
    """The CSV file, packed by gzip or not. Raises SettingsError naming the line."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        text = content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SettingsError(f"--splitwise {path}: cannot read it: {error}") from error
    lines = csv.DictReader(io.StringIO(text))
    missing = [name for name in Row.__struct_fields__ if name not in (lines.fieldnames or [])]
    if missing:
        raise SettingsError(f"--splitwise {path}, line 1: no column {', '.join(missing)}")
    try:
        return [_row(path, lines.line_num, values) for values in lines]
    except csv.Error as error:
        raise SettingsError(f"--splitwise {path}, line {lines.line_num}: {error}") from error


def _row(path: Path, number: int, values: dict[str, str]) -> Row:
    where = f"--splitwise {path}, line {number}"
    try:
        row = msgspec.convert({key: values[key] for key in Row.__struct_fields__}, Row, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{where}: {error}") from error
    for name in ("prompt_size", "batch_size", "prompt_time", "token_time", "e2e_time"):
        if not 0 < getattr(row, name) < float("inf"):
            raise SettingsError(f"{where}: {name} is {getattr(row, name)} and must be above zero")
    return row


def choose(rows: Sequence[Row], model: str, hardware: str, tensor_parallel: int) -> list[Row]:
    """Raises SettingsError that says what there is."""
    chosen = [
        row for row in rows if (row.model, row.hardware, row.tensor_parallel) == (model, hardware, tensor_parallel)
    ]
    if not chosen:
        known = sorted({f"{row.model} {row.hardware} {row.tensor_parallel}" for row in rows})
        raise SettingsError(
            f"no rows of --model {model} --hardware {hardware} --tensor-parallel {tensor_parallel}; "
            f"there are: {', '.join(known) or 'none at all'}"
        )
    return chosen


def profile_of(rows: Sequence[Row], name: str, progress: Callable[[str], None]) -> tuple[Profile, str]:
    """The profile fitted to all rows, and a table of how well fits without a combination predict it."""
    first = rows[0]
    if first.model not in KV_BYTES_PER_TOKEN:
        raise SettingsError(f"--model {first.model}: its KV bytes are not known, only {', '.join(KV_BYTES_PER_TOKEN)}")
    terms = _fit(rows)
    profile = Profile(
        name=name,
        model=first.model,
        hardware=f"{first.tensor_parallel} x {first.hardware}",
        source=(
            f"fitted to the measurements of Splitwise, data/perf_model.csv: {first.model}, {first.hardware}, "
            f"tensor_parallel {first.tensor_parallel}, {len(rows)} rows. Not in the data, assumed: a step that does "
            "both reads the weights once (overlap_ms: one sequence's decode step); steps of one batch of equal "
            "prompts stand for any; max_model_len is what was measured, not what the model was trained for"
            + ("" if terms.context_prefill_ms else ". These rows show no cost of context in prefill")
        ),
        licence=LICENCE,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN[first.model],
        max_model_len=MAX_MODEL_LEN,
        max_running=MAX_RUNNING,
        token_budget=TOKEN_BUDGET,
        prefill_ms=terms.prefill_ms,
        decode_ms=terms.decode_ms,
        context_prefill_ms=terms.context_prefill_ms,
        context_decode_ms=terms.context_decode_ms,
        overlap_ms=terms.decode_ms[0][1],
    )
    validation, table = _cross_validate(rows, profile, progress)
    return msgspec.structs.replace(profile, validation=validation), table


def _fit(rows: Sequence[Row]) -> Terms:
    return fit([step for row in rows for step in row.steps()], PREFILL_KNOTS, DECODE_KNOTS)


def _cross_validate(rows: Sequence[Row], profile: Profile, progress: Callable[[str], None]) -> tuple[Validation, str]:
    """Every (prompt, batch) in its turn is held out with all its rows, fitted without, and predicted.

    The smallest and the largest of all are reported but not counted: nothing is left on their other side.
    """
    combinations = sorted({row.combination for row in rows}, key=lambda one: (one[0] * one[1], one))
    counted: list[float] = []
    spreads: list[float] = []
    lines = ["| prompt tokens | batch | prefill ms | error | decode ms | error |", "|---|---|---|---|---|---|"]
    for done, combination in enumerate(combinations):
        progress(f"held out {done + 1} of {len(combinations)} combinations")
        without = _with_terms(profile, _fit([row for row in rows if row.combination != combination]))
        cells, errors = [], []
        for kind in (0, 1):
            steps = [row.steps()[kind] for row in rows if row.combination == combination]
            measured = np.array([step.seconds for step in steps])
            predicted = np.array([without.step_s(step.prefill, (step.sequences, step.context)) for step in steps])
            relative = predicted / measured - 1
            spreads += list(np.abs(measured / np.median(measured) - 1))
            errors += [float(abs(error)) for error in relative]
            cells.append(f"{1e3 * np.median(measured):.1f} | {100 * np.median(relative):+.1f} %")
        edge = done in (0, len(combinations) - 1)
        counted += [] if edge else errors
        lines.append(f"| {combination[0]}{' (edge)' if edge else ''} | {combination[1]} | {' | '.join(cells)} |")
    validation = Validation(
        steps=len(counted),
        median_error=round(float(np.median(counted)), 4),
        p90_error=round(float(np.quantile(counted, 0.9)), 4),
        spread=round(float(np.median(spreads)), 4),
        about="each (prompt, batch) held out in turn with all its rows, except the smallest and the largest",
    )
    return validation, "\n".join(lines)


def _with_terms(profile: Profile, terms: Terms) -> Profile:
    return msgspec.structs.replace(profile, **msgspec.structs.asdict(terms))
