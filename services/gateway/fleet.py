"""Who is alive and how busy, from heartbeats: a pure failure detector with the load that this gateway knows of.

How busy is worked out (forecast.py) when somebody asks, for those of whom something was heard since.

Three beats missed: `suspect`, nothing new is placed there. Then a ping that stays unanswered for PING_S, or finds no
responder, means lost; a store that saw the worker's socket close means lost at once; a new incarnation of an id means
that the old one died. Invariants: time is an argument; whoever watches a worker is told of its loss exactly once;
what this gateway sent to a worker counts there until a reply, or the second beat after it, includes it; a prompt counts
until what the worker last said of itself must have seen it: work is bound by when it should be done, and the answer
that it is done comes later by the way back.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from services.gateway import forecast
from services.gateway.admission import Speeds
from services.gateway.placement import Pools
from shared import wire

BEAT_S = 0.2
SUSPECT_S = 3.5 * BEAT_S  # three beats missed, and half a beat of grace
PING_S = 2.0
DEAF_S = 1.0  # beats that were under way when a store reported the loss are not a resurrection

WAY_S = 0.02  # to a worker and back, generously: what was sent so long before its word is in it
SPEEDS_S = 0.1  # how old the figures of the whole cluster may be; a beat is older
QUIET_S = 5 * BEAT_S  # a gateway that has said nothing for so long has no line
EXPECTED_OUTPUT = 128.0  # tokens of an answer, before any has ended
OUTPUT_WEIGHT = 0.05  # of the newest answer

MAX_NODES = 1024

OnLoss = Callable[[], None]


@dataclass(slots=True)
class Charge:
    """Load of one job, counted by this gateway until the worker counts it itself."""

    worker: str
    jobs: int
    tokens: int  # of a prompt to compute; 0: none
    made_at: float
    sent_at: float | None = None  # None: still here
    beats: int = 0  # heard since it was sent
    open: bool = True


@dataclass(slots=True)
class _Worker:
    beat: wire.Heartbeat
    seen_at: float
    beats: int = 0
    suspect: bool = False
    backlog: wire.Backlog = field(default_factory=wire.Backlog)
    backlog_at: float = 0.0
    charges: list[Charge] = field(default_factory=list)
    watchers: set[OnLoss] = field(default_factory=set)


class Fleet:
    def __init__(self, model: str, *, gateway: str = "", arrangement: str = "split") -> None:
        """`model`: the served name; workers of another model are not ours. `gateway`: who asks."""
        self._model = model
        self._gateway = gateway
        self._arrangement = arrangement
        self._workers: dict[str, _Worker] = {}
        self._deaf_until: dict[str, float] = {}
        self._listeners: list[Callable[[], None]] = []
        self.max_model_len = 0  # the smallest that a worker has announced
        self.expected_output = EXPECTED_OUTPUT
        self._pools = Pools()
        self._links: dict[str, float] = {}  # node -> seconds for a token's KV from another node
        self._unread: set[str] = set()  # workers whose candidate is not up to date
        self._lines: dict[str, tuple[float, wire.Backlog]] = {}  # of other gateways: when heard
        self._speeds: dict[float, tuple[float, Speeds]] = {}  # by ITL target: when worked out

    def on_change(self, listener: Callable[[], None]) -> None:
        """Called whenever a request that had to wait may fit now."""
        self._listeners.append(listener)

    # ---- what is heard -------------------------------------------------------------------------------------

    def hear(self, beat: wire.Heartbeat, now: float) -> None:
        if beat.role == "kv":
            for worker in beat.lost:
                self._deaf_until[worker] = now + DEAF_S
                self.lose(worker)
            self._hear_link(beat)
            return
        if beat.role == "gateway":
            if beat.id != self._gateway:
                self._lines[beat.id] = (now, beat.backlog)
                self._lines = {id_: line for id_, line in self._lines.items() if now - line[0] < QUIET_S}
            return
        if beat.role not in ("prefill", "decode") or (beat.model and beat.model != self._model):
            return
        if self._deaf_until.get(beat.id, 0.0) > now:
            return
        self._deaf_until.pop(beat.id, None)
        known = self._workers.get(beat.id)
        if known is not None and known.beat.incarnation != beat.incarnation:
            self.lose(beat.id)
            known = None
        if known is None:
            known = self._workers[beat.id] = _Worker(beat, now)
        self._refresh(known, beat, now)
        self._changed()

    def _hear_link(self, beat: wire.Heartbeat) -> None:
        """The best of all that were measured: one that was measured in a bad moment must be tried again."""
        if beat.peer_bytes_per_s and beat.block_size and (beat.node in self._links or len(self._links) < MAX_NODES):
            self._links[beat.node] = beat.block_bytes / beat.block_size / beat.peer_bytes_per_s
            self._pools.link_token_s = min(self._links.values())

    def report(self, worker: str, backlog: wire.Backlog, now: float) -> bool:
        """A reply or batch tells the load more freshly than the last beat. Returns whether it says something new."""
        known = self._workers.get(worker)
        if known is None or (backlog == known.backlog and not backlog.queued_prompts):
            return False  # which is what most batches say
        known.backlog, known.backlog_at = backlog, now
        self._unread.add(worker)
        return True

    def answered(self, tokens: int) -> None:
        """An answer of so many tokens has ended."""
        self.expected_output += OUTPUT_WEIGHT * (tokens - self.expected_output)

    def excuse(self, now: float) -> None:
        """Our own bus was away: silence until now says nothing about workers."""
        for worker in self._workers.values():
            worker.seen_at = max(worker.seen_at, now)

    def check(self, now: float) -> list[str]:
        """Suspect those who are late; returns whom to ping."""
        late = [name for name, worker in self._workers.items() if now - worker.seen_at > SUSPECT_S]
        for name in late:
            self._workers[name].suspect = True
            self._unread.add(name)
        return late

    def lose(self, worker: str) -> None:
        """It is gone: tell everybody who uses it."""
        lost = self._workers.pop(worker, None)
        self._unread.discard(worker)
        self._pools.remove(worker)
        if lost is None:
            return
        watchers, lost.watchers = lost.watchers, set()
        for tell in watchers:
            tell()
        self._changed()

    # ---- what is asked -------------------------------------------------------------------------------------

    def pools(self) -> Pools:
        """Those who may be given work now."""
        for name in self._unread:
            worker = self._workers[name]
            if _usable(worker):
                self._pools.put(forecast.candidate(_heard(worker), self.expected_output))
            else:
                self._pools.remove(name)
        self._unread.clear()
        return self._pools

    def everybody(self) -> list[forecast.Heard]:
        """Who lives and says that it is ready."""
        return [_heard(worker) for worker in self._workers.values() if _usable(worker)]

    def speeds(self, now: float, itl_s: float) -> Speeds:
        """Of the whole cluster, SPEEDS_S old at most."""
        worked_out, speeds = self._speeds.get(itl_s, (-SPEEDS_S, Speeds()))
        if now - worked_out >= SPEEDS_S:
            usable = [_heard(worker) for worker in self._workers.values() if _usable(worker)]
            output, how = self.expected_output, self._arrangement
            speeds = forecast.speeds(usable, now, arrangement=how, itl_s=itl_s, expected_output=output)
            self._speeds[itl_s] = (now, speeds)
        return speeds

    def shape(self) -> tuple[int, str] | None:
        """(block size, fingerprint) of the KV that is handed over; None: nobody has said."""
        for worker in self._workers.values():
            if worker.beat.fingerprint and worker.beat.block_size and "decode" in worker.beat.takes:
                return worker.beat.block_size, worker.beat.fingerprint
        return None

    def prompt_s(self, tokens: int) -> float:
        """What so many take to compute, at the fastest; 0: not known."""
        fastest = max((worker.beat.prefill_tokens_per_s for worker in self._workers.values()), default=0.0)
        return tokens / fastest if fastest else 0.0

    def lines_elsewhere(self, now: float) -> tuple[int, int]:
        """(prompts, tokens) that wait at other gateways."""
        lines = [line for heard_at, line in self._lines.values() if now - heard_at < QUIET_S]
        return sum(line.queued_prompts for line in lines), sum(line.queued_tokens for line in lines)

    def has(self, work: str, besides: Collection[str] = ()) -> bool:
        """Is anybody there who takes this work, busy, or silent for a moment and not lost yet?

        A suspect gets nothing new, but a worker whose machine is busy misses beats and comes back: requests wait
        for the failure detector's word, which takes seconds, and are not refused on suspicion.
        """
        return any(
            work in worker.beat.takes and worker.beat.state == "ready"
            for name, worker in self._workers.items()
            if name not in besides
        )

    def beats(self, worker: str) -> int:
        """How often this worker has been heard; grows with every beat."""
        known = self._workers.get(worker)
        return known.beats if known is not None else 0

    def forces(self, worker: str) -> bool:
        """Whether it takes jobs that begin with a replay."""
        known = self._workers.get(worker)
        return known is not None and known.beat.forces

    def has_forcing(self) -> bool:
        """Is a decode worker alive that does?"""
        return any(one.beat.forces and "decode" in one.beat.takes and _usable(one) for one in self._workers.values())

    def states(self) -> dict[tuple[str, str], int]:
        """(role, state) -> how many, for `baton_workers`."""
        counts: dict[tuple[str, str], int] = {}
        for worker in self._workers.values():
            key = (worker.beat.role, "lost" if worker.suspect else worker.beat.state)
            counts[key] = counts.get(key, 0) + 1
        return counts

    def charge(self, worker: str, *, jobs: int, tokens: int, now: float) -> Charge:
        charge = Charge(worker, jobs, tokens, now)
        known = self._workers.get(worker)
        if known is not None:
            known.charges.append(charge)
            self._unread.add(worker)
        return charge

    def settle(self, charge: Charge) -> None:
        """The worker counts it now, or it never will."""
        if not charge.open:
            return
        charge.open = False
        known = self._workers.get(charge.worker)
        if known is not None and charge in known.charges:
            known.charges.remove(charge)
            self._unread.add(charge.worker)

    @contextmanager
    def watching(self, worker: str, on_loss: OnLoss) -> Iterator[None]:
        """Within, `on_loss` is called when the worker is lost; at once if it is not there any more."""
        known = self._workers.get(worker)
        if known is None:
            on_loss()
            yield
            return
        known.watchers.add(on_loss)
        try:
            yield
        finally:
            known.watchers.discard(on_loss)

    # ---- inside --------------------------------------------------------------------------------------------

    def _refresh(self, worker: _Worker, beat: wire.Heartbeat, now: float) -> None:
        worker.beat = beat
        worker.seen_at = now
        worker.suspect = False
        worker.backlog, worker.backlog_at = beat.backlog, now
        worker.beats += 1
        self._unread.add(beat.id)
        for charge in worker.charges:
            charge.beats += charge.sent_at is not None
        # The first beat after a job may have been under way when it was sent; the second has seen it.
        worker.charges = [charge for charge in worker.charges if charge.beats < 2]
        if beat.max_model_len:
            self.max_model_len = min(self.max_model_len or beat.max_model_len, beat.max_model_len)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()


def _usable(worker: _Worker) -> bool:
    return not worker.suspect and worker.beat.state == "ready"


def _heard(worker: _Worker) -> forecast.Heard:
    seen_until = worker.backlog_at - WAY_S
    prompts = [
        (max(one.made_at, worker.backlog_at) if one.sent_at is None else one.sent_at, one.tokens, one.jobs)
        for one in worker.charges
        if one.tokens
    ]
    unseen = [jobs for sent_at, _, jobs in prompts if sent_at > seen_until]
    return forecast.Heard(
        beat=worker.beat,
        backlog=worker.backlog,
        backlog_at=worker.backlog_at,
        jobs=sum(one.jobs for one in worker.charges if not one.tokens) + sum(unseen),
        prompts=[(sent_at, tokens) for sent_at, tokens, _ in prompts],
        seen_until=seen_until,
        bound_at=max((one.made_at for one in worker.charges if one.tokens), default=0.0),
    )
