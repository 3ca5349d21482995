"""Measured speeds of one worker: placement and admission predict with them.

Invariants: time is an argument; nothing is said before enough has been seen. What is measured is a step of prompts:
those that are done in the same moment were computed together, and share what a step costs whatever is in it. A full
step also computes a part of the next prompt: counted by ended prompts alone, full steps of one and of two would seem to
take equally long, and a token to cost nothing.
"""

from dataclasses import dataclass, field
from math import ceil

from shared.line import Line

Key = tuple[str, int]  # request, attempt

TOGETHER = 0.25  # prompts done within this share of their step's time come from one step


@dataclass(slots=True)
class _Prompt:
    tokens: int
    begun_s: float


@dataclass(slots=True)
class Prompts:
    """The prompts that this worker has accepted and not yet computed, and what a step of them costs."""

    line: Line = field(default_factory=lambda: Line(proportional=True))
    step_limit: int = 0  # the most tokens that a step computes; 0: not known
    _open: dict[Key, _Prompt] = field(default_factory=dict)
    _last_s: float = 0.0  # when the last step was done,
    _step_s: float = 0.0  # what it took,
    _step_tokens: int = 0  # the tokens of those that it has ended,
    _step_most: int = 0  # and of all that were there when it began, as far as they go into it
    _carried: int = 0  # computed of prompts that were not at their end with the last step

    def begin(self, key: Key, tokens: int, now_s: float) -> None:
        self._open[key] = _Prompt(tokens, now_s)

    def done(self, key: Key, computed: int, now_s: float) -> None:
        """It is computed; `computed` tokens of it were not cached."""
        prompt = self._open.pop(key, None)
        if prompt is None or computed <= 1:
            return
        if now_s - self._last_s > TOGETHER * self._step_s:
            self._close(prompt)
            began_s = max(prompt.begun_s, self._last_s)
            self._step_s, self._step_tokens, self._step_most = now_s - began_s, 0, self._most(computed, began_s)
            self._last_s = now_s
        self._step_tokens += computed

    def _most(self, computed: int, began_s: float) -> int:
        """What steps that began then can have computed until a prompt of so many tokens was done; 0: not known."""
        left = computed - self._carried
        there = left + sum(prompt.tokens for prompt in self._open.values() if prompt.begun_s <= began_s)
        return min(there, self.step_limit * max(1, ceil(left / self.step_limit))) if self.step_limit else 0

    def _close(self, following: _Prompt) -> None:
        """The last step has no more prompts to come: `following` was done in a later one."""
        if self._step_tokens:
            ended = self._step_tokens - self._carried
            tokens = max(1, ended, self._step_most)
            self.line.see(tokens, self._step_s)
            still_open = following.tokens + sum(prompt.tokens for prompt in self._open.values())
            self._carried = min(still_open, tokens - ended)
        self._step_tokens = 0

    def drop(self, key: Key) -> None:
        """It ended in another way, or it is done already."""
        self._open.pop(key, None)

    def backlog(self, now_s: float) -> tuple[int, int]:
        """(prompts, tokens) still to compute: of the one in work, what should be left of it."""
        if not self._open:
            return 0, 0
        tokens = sum(prompt.tokens for prompt in self._open.values())
        _, token_s = self.line.terms()
        if token_s > 0:
            first = next(iter(self._open.values()))
            tokens -= min(first.tokens, int((now_s - max(first.begun_s, self._last_s)) / token_s))
        return len(self._open), max(0, tokens)

    def forget(self) -> None:
        """What was measured so far was no work."""
        self.line, self._step_tokens, self._carried = Line(proportional=True), 0, 0


@dataclass(slots=True)
class Steps:
    """The gap between two tokens of a sequence, by how many run beside it."""

    line: Line = field(default_factory=lambda: Line(proportional=False, weight=0.02))

    def see(self, running: int, gap_s: float) -> None:
        if gap_s > 0:
            self.line.see(running, gap_s)

    def step_s(self, running: int) -> float:
        fixed_s, sequence_s = self.line.terms()
        return fixed_s + sequence_s * max(1, running)

    @property
    def sequence_s(self) -> float:
        return self.line.terms()[1]
