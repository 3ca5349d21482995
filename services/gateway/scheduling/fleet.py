"""Who is alive and how busy, from heartbeats: a pure failure detector with the load that this gateway knows of.

How busy is worked out (predict.py) when somebody asks, for those of whom something was heard since.

Three beats missed: `suspect`, nothing new is placed there. Then a ping that stays unanswered for PING_S, or finds no
responder, means lost; a store that saw the worker's socket close means lost at once; a new incarnation of an id means
that the old one died. Invariants: time is an argument; a loss is told exactly once;
what this gateway sent to a worker counts there until a reply, or the second beat after it, includes it; a prompt counts
until what the worker last said of itself must have seen it: work is bound by when it should be done, and the answer
that it is done comes later by the way back.
"""

import asyncio
from collections.abc import Callable, Collection

from services.gateway.scheduling import predict
from services.gateway.scheduling.admission import Speeds
from services.gateway.scheduling.placement import Pools
from services.gateway.scheduling.predict import Charge, Worker
from shared import wire

BEAT_S = 0.2
SUSPECT_S = 3.5 * BEAT_S  # three beats missed, and half a beat of grace
PING_S = 2.0
DEAF_S = 1.0  # beats that were under way when a store reported the loss are not a resurrection

SPEEDS_S = 0.1  # how old the figures of the whole cluster may be; a beat is older
QUIET_S = 5 * BEAT_S  # a gateway that has said nothing for so long has no line
EXPECTED_OUTPUT = 128.0  # tokens of an answer, before any has ended
OUTPUT_WEIGHT = 0.05  # of the newest answer

MAX_NODES = 1024


class Fleet:
    def __init__(self, model: str, *, gateway: str = "", arrangement: str = "split") -> None:
        """`model`: the served name; workers of another model are not ours. `gateway`: who asks."""
        self._model = model
        self._gateway = gateway
        self._arrangement = arrangement
        self._workers: dict[str, Worker] = {}
        self._deaf_until: dict[str, float] = {}
        self._on_change: list[Callable[[], None]] = []
        self._on_loss: list[Callable[[str], None]] = []
        self._change = asyncio.Event()  # the next
        self.max_model_len = 0  # the smallest that a worker has announced
        self.expected_output = EXPECTED_OUTPUT
        self._pools = Pools()
        self._links: dict[str, float] = {}  # node -> seconds for a token's KV from another node
        self._stale: set[str] = set()  # workers whose record is not up to date
        self._lines: dict[str, tuple[float, wire.Backlog]] = {}  # of other gateways: when heard
        self._speeds: dict[float, tuple[float, Speeds]] = {}  # by ITL target: when worked out

    def on_change(self, listener: Callable[[], None]) -> None:
        """Called whenever a request that had to wait may fit now."""
        self._on_change.append(listener)

    def on_loss(self, listener: Callable[[str], None]) -> None:
        """Called with the id of every worker that is lost."""
        self._on_loss.append(listener)

    async def change(self) -> None:
        """Until it is not what it was: a beat came, a worker was lost."""
        await self._change.wait()

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
            known = self._workers[beat.id] = Worker(id=beat.id, takes=frozenset(beat.takes), beat=beat, seen_at=now)
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
        self._stale.add(worker)
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
            self._stale.add(name)
        return late

    def lose(self, worker: str) -> None:
        """It is gone: tell everybody who uses it."""
        lost = self._workers.pop(worker, None)
        self._stale.discard(worker)
        self._pools.remove(worker)
        if lost is None:
            return
        for tell in self._on_loss:
            tell(worker)
        self._changed()

    # ---- what is asked -------------------------------------------------------------------------------------

    def pools(self) -> Pools:
        """Those who may be given work now, up to date."""
        for name in self._stale:
            worker = self._workers[name]
            if worker.is_usable:
                predict.refresh(worker, self.expected_output)
                self._pools.put(worker)
            else:
                self._pools.remove(name)
        self._stale.clear()
        return self._pools

    def everybody(self) -> list[Worker]:
        """Who lives and says that it is ready, up to date."""
        self.pools()
        return [worker for worker in self._workers.values() if worker.is_usable]

    def lives(self, worker: str) -> bool:
        return worker in self._workers

    def speeds(self, now: float, itl_s: float) -> Speeds:
        """Of the whole cluster, SPEEDS_S old at most."""
        worked_out, speeds = self._speeds.get(itl_s, (-SPEEDS_S, Speeds()))
        if now - worked_out >= SPEEDS_S:
            output, how = self.expected_output, self._arrangement
            speeds = predict.speeds(self.everybody(), now, arrangement=how, itl_s=itl_s, expected_output=output)
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
        return any(one.beat.forces and "decode" in one.beat.takes and one.is_usable for one in self._workers.values())

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
            self._stale.add(worker)
        return charge

    def settle(self, charge: Charge) -> None:
        """The worker counts it now, or it never will."""
        if not charge.open:
            return
        charge.open = False
        known = self._workers.get(charge.worker)
        if known is not None and charge in known.charges:
            known.charges.remove(charge)
            self._stale.add(charge.worker)

    # ---- inside --------------------------------------------------------------------------------------------

    def _refresh(self, worker: Worker, beat: wire.Heartbeat, now: float) -> None:
        predict.listen(worker, beat)
        worker.seen_at = now
        worker.suspect = False
        worker.backlog, worker.backlog_at = beat.backlog, now
        worker.beats += 1
        self._stale.add(beat.id)
        for charge in worker.charges:
            charge.beats += charge.sent_at is not None
        # The first beat after a job may have been under way when it was sent; the second has seen it.
        worker.charges = [charge for charge in worker.charges if charge.beats < 2]
        if beat.max_model_len:
            self.max_model_len = min(self.max_model_len or beat.max_model_len, beat.max_model_len)

    def _changed(self) -> None:
        for listener in self._on_change:
            listener()
        change, self._change = self._change, asyncio.Event()
        change.set()
