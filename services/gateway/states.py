"""The states of a request's journey, what may follow what, and the span that each one opens."""

import time
from enum import Enum

from opentelemetry import trace

from shared import telemetry


class State(Enum):
    EDGE = "edge"  # read, validate, tokenise
    ADMISSION = "admission"
    QUEUED = "queued"  # until there is room, and then placed
    RESERVING = "reserving"  # a decode worker is asked
    HANDOFF = "handoff"  # it has accepted; the prompt is being computed somewhere
    STREAMING = "streaming"  # tokens have been seen
    DONE = "done"
    FAILED = "failed"  # refused, broken or cancelled: the error says which


ENDS = frozenset({State.DONE, State.FAILED})
NEXT: dict[State, frozenset[State]] = {
    State.EDGE: frozenset({State.ADMISSION, State.FAILED}),
    State.ADMISSION: frozenset({State.QUEUED, State.FAILED}),
    State.QUEUED: frozenset({State.RESERVING, State.FAILED}),
    State.RESERVING: frozenset({State.HANDOFF, State.QUEUED, State.FAILED}),  # back: Busy, or the worker is gone
    State.HANDOFF: frozenset({State.STREAMING, State.QUEUED, State.FAILED}),  # back: decode or all prefill lost
    State.STREAMING: frozenset({State.DONE, State.QUEUED, State.FAILED}),  # back: resumed on another worker
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
}
SPANS = {State.ADMISSION: telemetry.GATEWAY_ADMISSION, State.QUEUED: telemetry.GATEWAY_QUEUE}


class WrongTransition(Exception):
    """A fault of this program, never of a request."""


class Course:
    """Where a request is; `enter` checks the way there and opens and closes the spans."""

    def __init__(self, state: State = State.EDGE) -> None:
        self.state = state
        self.since = time.monotonic()
        self.spent_s: dict[State, float] = {}  # in states that were left, over all attempts
        self._span: trace.Span | None = None

    def enter(self, state: State) -> None:
        if state not in NEXT[self.state]:
            raise WrongTransition(f"{self.state.value} -> {state.value}")
        if self._span is not None:
            self._span.end()
            self._span = None
        now = time.monotonic()
        self.spent_s[self.state] = self.spent_s.get(self.state, 0.0) + now - self.since
        self.state, self.since = state, now
        if state in SPANS:
            self._span = telemetry.tracer().start_span(SPANS[state])

    def fail(self) -> None:
        if self.state not in ENDS:
            self.enter(State.FAILED)
