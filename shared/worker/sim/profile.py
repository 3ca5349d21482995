"""How long an engine step takes, as a measured profile says: a few terms fitted to a real engine, one file each.

A step's time in milliseconds is

    prefill_ms(prefill tokens) + context_prefill_ms x pairs of (prefill token, token before it)
    + decode_ms(sequences) + context_decode_ms x context tokens of the decoding sequences
    - overlap_ms when it does both, and never less than the dearer of the two alone.

Invariants: knots ascend and their times never fall, so more work never takes less time; times are positive, so a step
never takes none.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from shared.errors import SettingsError
from shared.settings import Count

PROFILES = Path(__file__).parent / "profiles"

NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Knots = Annotated[list[tuple[float, float]], msgspec.Meta(min_length=1)]


class Validation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicted against measured on steps that were not fitted; errors are relative to the measured time."""

    steps: int
    median_error: float
    p90_error: float
    spread: float  # how far single steps of equal work lie from their median, at the median: the noise of the machine
    about: str = ""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on one kind of hardware."""

    name: str
    model: str
    hardware: str
    source: str  # where the figures come from
    licence: str
    kv_bytes_per_token: Count  # all layers and ranks, the true size
    max_model_len: Count
    max_running: Count  # sequences
    token_budget: Count  # tokens a step
    prefill_ms: Knots  # [prefill tokens of a step, ms]; constant before the first, the last slope after the last
    decode_ms: Knots  # [decoding sequences of a step, ms], likewise
    context_prefill_ms: NotNegative = 0.0  # a pair of a prefill token and a token before it
    context_decode_ms: NotNegative = 0.0  # a context token of a decoding sequence
    overlap_ms: NotNegative = 0.0  # what a step that does both saves, e.g. reading the weights once
    validation: Validation | None = None

    def __post_init__(self) -> None:
        for field, knots in (("prefill_ms", self.prefill_ms), ("decode_ms", self.decode_ms)):
            _check(field, knots)

    def step_s(self, prefill: Sequence[tuple[int, int]], decode: list[int] | tuple[int, int] = (0, 0)) -> float:
        """Seconds of one step.

        `prefill`: (tokens, context before them) of each chunk. `decode`: the list of the sequences' contexts, or the
        tuple (sequences, their contexts added up). A step without work takes no time.
        """
        sequences, context = decode if isinstance(decode, tuple) else (len(decode), sum(decode))
        prefill_ms = decode_ms = saved_ms = 0.0
        if prefill:
            tokens = pairs = 0
            for chunk, before in prefill:
                tokens += chunk
                pairs += chunk * (2 * before + chunk)
            prefill_ms = interpolate(self.prefill_ms, tokens) + self.context_prefill_ms * pairs / 2
        if sequences:
            decode_ms = interpolate(self.decode_ms, sequences) + self.context_decode_ms * context
            saved_ms = min(self.overlap_ms, prefill_ms, decode_ms)
        return (prefill_ms + decode_ms - saved_ms) / 1e3


def interpolate(knots: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear: constant before the first knot, the last slope after the last."""
    at = bisect_left(knots, (x,))
    if at == 0:
        return knots[0][1]
    if at == len(knots):
        if at == 1:
            return knots[0][1]
        at -= 1
    (x0, y0), (x1, y1) = knots[at - 1], knots[at]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def load_profile(name_or_path: str) -> Profile:
    """A shipped profile by its name, or a file by its path. Raises SettingsError that says what is wrong with it."""
    path = Path(name_or_path)
    if path.suffix != ".json" and len(path.parts) == 1:
        path = PROFILES / f"{name_or_path}.json"
        if not path.is_file():
            raise SettingsError(f"profile {name_or_path!r}: known are {', '.join(shipped())}, or give a file's path")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except OSError as error:
        raise SettingsError(f"profile {path}: cannot read it: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"profile {path}: {error}") from error


def shipped() -> list[str]:
    """Names of the profiles that come with Baton."""
    return sorted(file.stem for file in PROFILES.glob("*.json"))


def _check(field: str, knots: Sequence[tuple[float, float]]) -> None:
    before_x, before_ms = 0.0, 0.0
    for x, ms in knots:
        if not (math.isfinite(x) and math.isfinite(ms)) or x <= before_x or ms <= 0 or ms < before_ms:
            raise ValueError(
                f"{field}: knots must ascend from above zero with positive times that never fall; [{x:g}, {ms:g}] "
                f"comes after [{before_x:g}, {before_ms:g}]"
            )
        before_x, before_ms = x, ms
