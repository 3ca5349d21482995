"""From what workers say of themselves to what placement and admission go by: pure arithmetic, times as arguments."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from services.gateway.admission import Speeds
from services.gateway.placement import Candidate
from shared import wire

TOGETHER_S = 0.005  # prompts sent within it of each other are computed in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A worker's last words, and the jobs sent to it since."""

    beat: wire.Heartbeat
    backlog: wire.Backlog  # of the beat, or of a fresher reply
    backlog_at: float
    jobs: int = 0  # sent, and not in its backlog yet
    prompts: Sequence[tuple[float, int]] = ()  # without an answer yet: when sent, tokens; in order
    seen_until: float = 0.0  # those sent before should be in its backlog
    bound_at: float = 0.0  # when it was given the last of them


def candidate(heard: Heard, expected_output: float) -> Candidate:
    """`expected_output`: tokens of an answer, of late."""
    beat, backlog = heard.beat, heard.backlog
    jobs = backlog.running + backlog.waiting + heard.jobs
    prompt_s, token_s = beat.prefill_prompt_s, 1 / beat.prefill_tokens_per_s if beat.prefill_tokens_per_s else 0.0
    tokens_until = heard.backlog_at + backlog.queued_tokens * token_s
    prompts, alone, done_at, last_at = backlog.queued_prompts, 0.0, 0.0, 0.0
    for sent_at, tokens in heard.prompts:
        alone = max(alone, sent_at) + tokens * token_s
        done_at = max(done_at, sent_at) + tokens * token_s + (prompt_s if sent_at - last_at > TOGETHER_S else 0.0)
        last_at = sent_at
        if sent_at > heard.seen_until:
            tokens_until = max(tokens_until, sent_at) + tokens * token_s
            prompts += 1
    # They are not done before they could be by themselves: where the way takes longer, its word did not know of them.
    tokens_until = max(tokens_until, alone)
    # Those that wait are computed in one step: what a step costs by itself counts for it and for the one in work.
    steps = min(2, prompts)
    over = jobs + 1 - beat.max_running if beat.max_running else 0
    step_s = beat.decode_step_s + beat.decode_sequence_s * max(0, jobs + 1 - backlog.running)
    return Candidate(
        id=beat.id,
        takes=frozenset(beat.takes),
        node=beat.node,
        fingerprint=beat.fingerprint,
        has_room=beat.max_running == 0 or jobs < beat.max_running + beat.max_waiting,
        load=jobs / (beat.max_running or 1),
        prompts=prompts,
        tokens_until=tokens_until,
        begins_at=tokens_until + steps * prompt_s,
        done_at=max(tokens_until, done_at),
        bound_at=heard.bound_at,
        prompt_s=prompt_s,
        token_s=token_s,
        sequence_s=over * expected_output * step_s / beat.max_running if over > 0 else 0.0,
        step_s=step_s if jobs else 0.0,
        load_s=beat.load_s,
        load_token_s=beat.load_token_s,
        kv_free=beat.kv_tokens * (1 - beat.kv_usage) - beat.kv_promised if beat.kv_tokens else inf,
    )


def speeds(everybody: Iterable[Heard], now: float, *, arrangement: str, itl_s: float, expected_output: float) -> Speeds:
    """Of the whole cluster. Prompts are computed by prefill workers, or by decode workers where there are none."""
    heard = list(everybody)
    decoders = [one for one in heard if "decode" in one.beat.takes]
    prefillers = [one for one in heard if "prefill" in one.beat.takes]
    if arrangement == "unsplit" or not prefillers:
        prefillers = decoders
    elif arrangement == "auto":
        # A decode worker that is busy computes prompts only where it may; it does when prefill is the bottleneck.
        prefillers = prefillers + [one for one in decoders if not one.backlog.running]
    known = [one for one in prefillers if one.beat.prefill_tokens_per_s]
    seen = [candidate(one, expected_output) for one in known]
    fastest = max(known, key=lambda one: one.beat.prefill_tokens_per_s, default=None)
    hands_over = bool(decoders) and prefillers is not decoders
    sequences = sum(room_for(one.beat, itl_s) for one in decoders)
    ending = sum(_ends_per_s(one.beat, itl_s, expected_output) for one in decoders)
    jobs = sum(one.backlog.running + one.backlog.waiting + one.jobs for one in decoders)
    return Speeds(
        prefill_tokens_per_s=sum(one.beat.prefill_tokens_per_s for one in known),
        backlog_s=sum(max(0.0, one.begins_at - now) for one in seen) / len(seen) if seen else 0.0,
        prompt_s=fastest.beat.prefill_prompt_s if fastest else 0.0,
        token_s=1 / fastest.beat.prefill_tokens_per_s if fastest else 0.0,
        load_s=min((one.beat.load_s for one in decoders), default=0.0) if hands_over else 0.0,
        load_token_s=min((one.beat.load_token_s for one in decoders), default=0.0) if hands_over else 0.0,
        prefillers=len(known),
        free_sequences=max(0.0, sequences - jobs),
        sequences=sequences,
        requests_per_s=ending,
        idle=any(one.backlog.running + one.backlog.waiting + one.jobs == 0 for one in prefillers),
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
