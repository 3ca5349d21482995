"""From what workers say of themselves to what placement and admission go by: pure arithmetic, times as arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import msgspec

from services.gateway.scheduling.admission import Speeds
from services.gateway.scheduling.placement import Candidate
from shared import wire

TOGETHER_S = 0.005  # prompts sent within it of each other are computed in one step
WAY_S = 0.02  # to a worker and back, generously: what was sent so long before its word is in it


class Charge(msgspec.Struct, eq=False):
    """Load of one job, counted by this gateway until the worker counts it itself."""

    worker: str
    jobs: int
    tokens: int  # of a prompt to compute; 0: none
    made_at: float
    sent_at: float | None = None  # None: still here
    beats: int = 0  # heard since it was sent
    open: bool = True


@dataclass(slots=True, kw_only=True, eq=False)
class Worker(Candidate):
    """A worker's last words, the jobs sent to it since, and what `refresh` makes of them."""

    beat: wire.Heartbeat
    seen_at: float
    beats: int = 0
    suspect: bool = False
    backlog: wire.Backlog = field(default_factory=wire.Backlog)  # of the beat, or of a fresher reply
    backlog_at: float = 0.0
    charges: list[Charge] = field(default_factory=list)
    jobs: int = 0  # that it has and that are on their way to it

    @property
    def is_usable(self) -> bool:
        return not self.suspect and self.beat.state == "ready"


def refresh(worker: Worker, expected_output: float) -> None:
    """Bring what placement reads up to date. `expected_output`: tokens of an answer, of late."""
    beat, backlog = worker.beat, worker.backlog
    prompt_s = beat.prefill_prompt_s
    token_s = 1 / beat.prefill_tokens_per_s if beat.prefill_tokens_per_s else 0.0
    seen_until = worker.backlog_at - WAY_S
    tokens_until = worker.backlog_at + backlog.queued_tokens * token_s
    jobs = backlog.running + backlog.waiting
    prompts, alone, done_at, last_at, bound_at = backlog.queued_prompts, 0.0, 0.0, 0.0, 0.0
    backlog_at = worker.backlog_at
    for charge in worker.charges:  # there may be a hundred, several times a request: no calls in here
        tokens, sent_at, made_at = charge.tokens, charge.sent_at, charge.made_at
        if not tokens:
            jobs += charge.jobs
            continue
        if sent_at is None:
            sent_at = made_at if made_at > backlog_at else backlog_at
        if made_at > bound_at:
            bound_at = made_at
        work_s = tokens * token_s
        alone = (alone if alone > sent_at else sent_at) + work_s
        done_at = (done_at if done_at > sent_at else sent_at) + work_s
        if sent_at - last_at > TOGETHER_S:
            done_at += prompt_s
        last_at = sent_at
        if sent_at > seen_until:
            tokens_until = (tokens_until if tokens_until > sent_at else sent_at) + work_s
            prompts += 1
            jobs += charge.jobs
    # They are not done before they could be by themselves: where the way takes longer, its word did not know of them.
    tokens_until = max(tokens_until, alone)
    # Those that wait are computed in one step: what a step costs by itself counts for it and for the one in work.
    steps = min(2, prompts)
    over = jobs + 1 - beat.max_running if beat.max_running else 0
    step_s = beat.decode_step_s + beat.decode_sequence_s * max(0, jobs + 1 - backlog.running)
    worker.jobs = jobs
    worker.has_room = beat.max_running == 0 or jobs < beat.max_running + beat.max_waiting
    worker.load = jobs / (beat.max_running or 1)
    worker.prompts = prompts
    worker.tokens_until = tokens_until
    worker.begins_at = tokens_until + steps * prompt_s
    worker.done_at = max(tokens_until, done_at)
    worker.bound_at = bound_at
    worker.sequence_s = over * expected_output * step_s / beat.max_running if over > 0 else 0.0
    worker.step_s = step_s if jobs else 0.0


def listen(worker: Worker, beat: wire.Heartbeat) -> None:
    """Take over what only a beat can change."""
    worker.beat = beat
    worker.takes = frozenset(beat.takes)
    worker.node = beat.node
    worker.fingerprint = beat.fingerprint
    worker.prompt_s = beat.prefill_prompt_s
    worker.token_s = 1 / beat.prefill_tokens_per_s if beat.prefill_tokens_per_s else 0.0
    worker.load_s = beat.load_s
    worker.load_token_s = beat.load_token_s
    worker.kv_free = beat.kv_tokens * (1 - beat.kv_usage) - beat.kv_promised if beat.kv_tokens else inf


def speeds(heard: Sequence[Worker], now: float, *, arrangement: str, itl_s: float, expected_output: float) -> Speeds:
    """Of the whole cluster. Prompts are computed by prefill workers, or by decode workers where there are none.

    `heard`: who lives and says that it is ready, up to date.
    """
    decoders = [one for one in heard if "decode" in one.beat.takes]
    prefillers = [one for one in heard if "prefill" in one.beat.takes]
    if arrangement == "unsplit" or not prefillers:
        prefillers = decoders
    elif arrangement == "auto":
        # A decode worker that is busy computes prompts only where it may; it does when prefill is the bottleneck.
        prefillers = prefillers + [one for one in decoders if not one.backlog.running]
    known = [one for one in prefillers if one.beat.prefill_tokens_per_s]
    fastest = max(known, key=lambda one: one.beat.prefill_tokens_per_s, default=None)
    hands_over = bool(decoders) and prefillers is not decoders
    sequences = sum(room_for(one.beat, itl_s) for one in decoders)
    ending = sum(_ends_per_s(one.beat, itl_s, expected_output) for one in decoders)
    jobs = sum(one.jobs for one in decoders)
    return Speeds(
        prefill_tokens_per_s=sum(one.beat.prefill_tokens_per_s for one in known),
        backlog_s=sum(max(0.0, one.begins_at - now) for one in known) / len(known) if known else 0.0,
        prompt_s=fastest.beat.prefill_prompt_s if fastest else 0.0,
        token_s=1 / fastest.beat.prefill_tokens_per_s if fastest else 0.0,
        load_s=min((one.beat.load_s for one in decoders), default=0.0) if hands_over else 0.0,
        load_token_s=min((one.beat.load_token_s for one in decoders), default=0.0) if hands_over else 0.0,
        prefillers=len(known),
        free_sequences=max(0.0, sequences - jobs),
        sequences=sequences,
        requests_per_s=ending,
        idle=any(one.jobs == 0 for one in prefillers),
    )


def room_for(beat: wire.Heartbeat, itl_s: float) -> float:
    """How many a decode worker runs at once within the target."""
    most = float(beat.max_running) if beat.max_running else inf
    if beat.decode_step_s and beat.decode_sequence_s:
        alone_s = beat.decode_step_s - beat.decode_sequence_s * max(1, beat.backlog.running)
        most = min(most, max(1.0, (itl_s - alone_s) / beat.decode_sequence_s))
    return most


def _ends_per_s(beat: wire.Heartbeat, itl_s: float, expected_output: float) -> float:
    running = room_for(beat, itl_s)
    if running == inf or not beat.decode_step_s:
        return 0.0
    step_s = beat.decode_step_s + beat.decode_sequence_s * (running - max(1, beat.backlog.running))
    return running / (max(1.0, expected_output) * step_s) if step_s > 0 else 0.0
