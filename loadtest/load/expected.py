"""What an answer's text ought to be, where somebody knows: the seam to an engine whose output can be predicted."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from shared.errors import SettingsError
from shared.worker.sim.oracle import Oracle


class Expected(Protocol):
    """Called after the load has ended, so it may take its time. Pure."""

    def __call__(self, prompt: Sequence[int], max_tokens: int, /) -> str: ...


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """An answer to be checked. `row`: its place among its driver's rows."""

    row: int
    prompt: list[int]
    max_tokens: int
    text: str


def wrong(claims: Sequence[Claim], expected: Expected) -> list[int]:
    """The rows whose texts differ from what is expected."""
    return [claim.row for claim in claims if expected(claim.prompt, claim.max_tokens) != claim.text]


def of_engine(model: str, facts: Mapping[str, str]) -> Expected:
    """`model`: its folder or name; `facts`: what a worker says of its engine. Raises SettingsError."""
    if facts.get("engine") != "sim" or not model:
        engine = facts.get("engine", "unknown")
        raise SettingsError(
            f"--verify: texts can be predicted for a sim cluster on this machine, not of engine {engine}"
        )
    return Oracle.of_engine(model, facts).expected_text
