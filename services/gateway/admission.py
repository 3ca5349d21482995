"""May this request come in? Pure: a snapshot in, nothing or an error out.

First cut: the bounds of this gateway, and whether anybody is alive. Targets, quotas and KV headroom come later and
belong here.
"""

from dataclasses import dataclass

from shared.errors import BatonError, ContextLengthExceeded, Draining, NoCapacity, QueueFull

RETRY_WITHOUT_WORKERS_S = 5.0  # a worker needs longer to start, but clients should not stay away when it is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The gateway at one moment."""

    draining: bool
    connected: bool  # to the bus
    decode_alive: bool
    requests: int  # queued or in flight here
    max_requests: int
    queued: int
    served_per_s: float  # requests finished in a second, of late


def admit(snapshot: Snapshot) -> None:
    """Raises the refusal."""
    if snapshot.draining:
        raise Draining("this gateway is shutting down", retry_after_s=1.0)
    if not snapshot.connected:
        raise NoCapacity("the cluster cannot be reached now", retry_after_s=RETRY_WITHOUT_WORKERS_S)
    if not snapshot.decode_alive:
        raise NoCapacity("no decode worker is alive", retry_after_s=RETRY_WITHOUT_WORKERS_S)
    if snapshot.requests >= snapshot.max_requests:
        raise QueueFull("too many requests are waiting", retry_after_s=retry_after_s(snapshot))


def retry_after_s(snapshot: Snapshot) -> float:
    """When the backlog should be gone, from 1 s to a minute."""
    rate = snapshot.served_per_s or 1.0
    return min(60.0, max(1.0, (snapshot.queued + 1) / rate))


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


def _too_long(context: int, words: str, param: str) -> BatonError:
    return ContextLengthExceeded(f"this model's maximum context length is {context} tokens; {words}", param=param)
