"""May this request come in, and may it still? Pure: snapshots and predictions in, nothing or a refusal out.

`admit` looks at the gateway's bounds when a request arrives. `feasible` looks at its target, when it has to wait and
again when its turn has come. The target is the larger of the tier's and EMPTY times what this request would take on an
empty cluster, so that no prompt is refused for being long; nothing is refused for its target while nothing waits and a
worker is idle, nor before speeds are known.
"""

from collections.abc import Callable
from dataclasses import dataclass

from shared.errors import BatonError, ContextLengthExceeded, Draining, NoCapacity, QueueFull
from shared.line import Line

RETRY_WITHOUT_WORKERS_S = 5.0  # a worker needs longer to start, but clients should not stay away when it is there
HEADROOM = 0.95  # of the tier's target is promised: predictions miss by a few percent both ways
EMPTY = 1.5  # times its own prediction on an empty cluster: a target that anything may ask for
LEAST_RETRY_S = 1.0
MOST_RETRY_S = 60.0  # the official client waits no longer than that
UNSHRUNK = 2  # a tokeniser's normaliser may make a text shorter before it is cut into tokens
MOST_RATIO = 4.0  # of measured to predicted: a hiccup must not shut the door


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What the cluster does in a second, of late; zeros where nothing is known."""

    prefill_tokens_per_s: float = 0.0  # all workers that compute prompts
    backlog_s: float = 0.0  # of prompts that they have already, on average
    prompt_s: float = 0.0  # of a prompt that comes alone to the fastest,
    token_s: float = 0.0  # and each of its tokens more
    load_s: float = 0.0  # of a hand-off, and each of its tokens more
    load_token_s: float = 0.0
    prefillers: int = 0
    free_sequences: float = 0.0  # on decode workers, within their target
    sequences: float = 0.0  # in all
    requests_per_s: float = 0.0  # that decode workers end when they are full
    idle: bool = False  # there is a worker that does nothing


def admit(
    *,
    draining: bool,
    connected: bool,
    decode_alive: bool,
    requests: int,
    max_requests: int,
    queued_tokens: int,
    max_queued_tokens: int,
    retry_after_s: Callable[[], float],
) -> None:
    """Raises the refusal.

    `connected`: to the bus; `requests`: queued or in flight here; `queued_tokens`: with those of the request that asks;
    `retry_after_s`: when the line should be gone.
    """
    if draining:
        raise Draining("this gateway is shutting down", retry_after_s=1.0)
    if not connected:
        raise NoCapacity("the cluster cannot be reached now", retry_after_s=RETRY_WITHOUT_WORKERS_S)
    if not decode_alive:
        raise NoCapacity("no decode worker is alive", retry_after_s=RETRY_WITHOUT_WORKERS_S)
    if requests >= max_requests:
        raise QueueFull("too many requests are waiting", retry_after_s=retry_after_s())
    if queued_tokens > max_queued_tokens:
        raise QueueFull("too many prompt tokens are waiting", retry_after_s=retry_after_s())


def empty_s(speeds: Speeds, tokens: int) -> float | None:
    """The time to first token on an empty cluster; None: not known yet."""
    if not speeds.token_s:
        return None
    return speeds.prompt_s + speeds.load_s + tokens * (speeds.token_s + speeds.load_token_s)


def wait_s(speeds: Speeds, requests: int, tokens: float) -> float:
    """How long one waits that has these before it: for prompts to be computed, or for sequences to end."""
    prefill_s = decode_s = 0.0
    if speeds.prefill_tokens_per_s:
        compute_s = tokens / speeds.prefill_tokens_per_s
        # Steps are filled until their tokens take as long as a step by itself (placement.py).
        steps = min(requests / max(1, speeds.prefillers), compute_s / (speeds.prompt_s or 1.0) + 1)
        prefill_s = speeds.backlog_s + compute_s + steps * speeds.prompt_s
    missing = requests + 1 - speeds.free_sequences
    if missing > 0 and speeds.requests_per_s:
        decode_s = missing / speeds.requests_per_s
    return max(prefill_s, decode_s)


def target_s(tier_s: float, on_empty_s: float) -> float:
    return max(HEADROOM * tier_s, EMPTY * on_empty_s)


def feasible(*, expected_s: float, target: float, waits: bool, idle: bool) -> bool:
    """`expected_s`: to the first token, from the request's arrival; `waits`: anybody else does."""
    return expected_s <= target or (idle and not waits)


class Correction:
    """What one kind of prediction turned out to be worth: measured = fixed + ratio * predicted, of late."""

    def __init__(self) -> None:
        self._line = Line(proportional=True)

    def see(self, predicted_s: float, measured_s: float) -> None:
        """One outlier weighs no more than MOST_RATIO times its prediction, beyond what all have in common."""
        fixed, _ = self._line.terms()
        self._line.see(predicted_s, min(measured_s, fixed + MOST_RATIO * max(predicted_s, self._line.x)))

    def __call__(self, predicted_s: float) -> float:
        if not self._line.is_known:
            return predicted_s
        fixed, ratio = self._line.terms()
        return fixed + min(ratio, MOST_RATIO) * predicted_s

    @property
    def ratio(self) -> float:
        """Of the means, for a metric; 1 before anything is known."""
        return self._line.y / self._line.x if self._line.is_known and self._line.x > 0 else 1.0


class Appointments:
    """When clients that were refused should come back: the time that is missing, and one after the other.

    Told the same moment, all would come at once and be refused again. So each that is told a time takes what it will
    cost from those after it; with real time the promises are worked off.
    """

    def __init__(self) -> None:
        self._promised_until = 0.0

    def next_s(self, now: float, *, missing_s: float, cost_s: float) -> float:
        """Seconds until a client should ask again, LEAST_RETRY_S to MOST_RETRY_S."""
        promised = min(max(now, self._promised_until) + cost_s, now + MOST_RETRY_S)
        self._promised_until = promised
        return min(MOST_RETRY_S, max(LEAST_RETRY_S, missing_s + promised - now))


def fit(prompt: int, asked: int | None, context: int, *, prompt_param: str, limit_param: str) -> int:
    """How many tokens may be generated; 0 as `context`: not known yet. Raises ContextLengthExceeded."""
    if not context:
        return asked or 1
    if prompt >= context:
        raise _too_long(context, f"the prompt has {prompt}", prompt_param)
    if asked is None:
        return context - prompt
    if prompt + asked > context:
        raise _too_long(context, f"{prompt} in the prompt and {asked} for the completion were asked for", limit_param)
    return asked


def fit_text(characters: int, longest: int, context: int, *, param: str) -> None:
    """Before it is tokenised. `longest`: characters of a token, at most. Raises ContextLengthExceeded."""
    if context and characters > UNSHRUNK * longest * context:
        raise _too_long(context, f"the prompt has {characters} characters", param)


def _too_long(context: int, words: str, param: str) -> BatonError:
    return ContextLengthExceeded(f"this model's maximum context length is {context} tokens; {words}", param=param)
