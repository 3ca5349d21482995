"""What one engine step had to do and how long it took: the unit in which engines are measured and profiles fitted."""

from pathlib import Path

import msgspec


class Step(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float  # without `waited_s`
    waited_s: float = 0.0  # that the engine stood ready while other processes had its core
    prefill: list[tuple[int, int]] = []  # (tokens, context before them) of each chunk
    sequences: int = 0  # that decoded one token each
    context: int = 0  # of those, added up

    @property
    def prefill_tokens(self) -> int:
        return sum(tokens for tokens, _ in self.prefill)

    @property
    def pairs(self) -> float:
        """A prefill token with each token before it, in its chunk and in its context."""
        return sum(tokens * (before + tokens / 2) for tokens, before in self.prefill)

    @property
    def kind(self) -> str:
        if self.prefill and self.sequences:
            return "mixed"
        return "prefill" if self.prefill else "decode"


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a step log."""

    max_model_len: int
    max_running: int
    token_budget: int
    kv_tokens: int  # that the engine's own cache holds
    kv_bytes_per_token: int


def write_line(line: Step | EngineFacts) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def read_log(path: Path) -> tuple[EngineFacts, list[Step]]:
    facts, *steps = path.read_bytes().splitlines()
    return msgspec.json.decode(facts, type=EngineFacts), [msgspec.json.decode(line, type=Step) for line in steps]
