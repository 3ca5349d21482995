"""Token deltas on their way out: one TokenBatch per engine step per gateway.

An engine step wakes all its requests' tasks in one tick of the loop; each adds its row, and the sender runs a tick
later with all of them. That is what keeps the gateway's cost per token low. Steps that follow each other within APART_S
share a batch, and what they say of one choice is one row: a message, and a write to a client, cost every process on
their way more than that, and no reader sees the difference.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BatonError
from shared.worker.engine import EngineDelta

log = logging.getLogger(__name__)

APART_S = 0.004  # between two batches; steps of most engines are longer
PIECE = 20_000  # log probabilities in one message: about 1 MB, and the bus takes 8


@dataclass
class _Columns:
    requests: list[str] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)
    finish: dict[str, wire.Finish] = field(default_factory=dict)
    logprobs: dict[str, list[wire.TokenLogprob]] = field(default_factory=dict)
    failures: dict[str, wire.Failure] = field(default_factory=dict)
    usage: dict[str, wire.DecodeUsage] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[wire.TokenLogprob | None]] = field(default_factory=dict)


class RowStream:
    """The rows of one (request, attempt), numbered from 0."""

    def __init__(self, batches: "Batches", gateway: str, request: str, attempt: int) -> None:
        self._batches = batches
        self._gateway = gateway
        self._request = request
        self._attempt = attempt
        self._sequence = 0
        self._open: tuple[_Columns, int, int] | None = None  # its last row, if more may be added, and of which choice

    def delta(self, delta: EngineDelta, usage: wire.DecodeUsage | None = None) -> None:
        """One delta; `usage` with the last one of the request."""
        tokens = wire.pack_tokens(delta.tokens)
        if self._open is not None and delta.logprobs is None and delta.finish is None and usage is None:
            columns, at, choice = self._open
            if choice == delta.choice and self._batches.is_waiting(columns, self._gateway):
                columns.texts[at] += delta.text
                columns.tokens[at] += tokens
                return
        columns, row = self._row(delta.choice, delta.text, tokens)
        plain = delta.finish is None and delta.logprobs is None and usage is None
        self._open = (columns, int(row), delta.choice) if plain else None
        if delta.finish is not None:
            columns.finish[row] = delta.finish
        if delta.logprobs is not None:
            columns.logprobs[row] = delta.logprobs
        if usage is not None:
            columns.usage[row] = usage

    async def prompt(self, positions: list[wire.TokenLogprob | None]) -> None:
        """The prompt's log probabilities, before any delta. Each piece goes out by itself: all may not fit in one."""
        step = max(1, PIECE // (1 + max((len(position.top) for position in positions if position), default=0)))
        for start in range(0, len(positions), step):
            columns, row = self._row(0, "", b"")
            columns.prompt_logprobs[row] = positions[start : start + step]
            await self._batches.flush()

    def failure(self, failure: wire.Failure) -> None:
        """Ends the request."""
        columns, row = self._row(0, "", b"")
        columns.failures[row] = failure

    def _row(self, choice: int, text: str, tokens: bytes) -> tuple[_Columns, str]:
        columns = self._batches.columns(self._gateway)
        columns.requests.append(self._request)
        columns.attempts.append(self._attempt)
        columns.sequences.append(self._sequence)
        columns.choices.append(choice)
        columns.texts.append(text)
        columns.tokens.append(tokens)
        self._sequence += 1
        return columns, str(len(columns.requests) - 1)


class Batches:
    """Collects rows by gateway and sends them. `run` is a task of the worker."""

    def __init__(
        self,
        bus: Bus,
        cluster: str,
        worker: str,
        *,
        backlog: Callable[[], wire.Backlog],
        sent: Callable[[int], None],
        apart_s: float = APART_S,
    ) -> None:
        """`backlog` goes with every batch; `sent` hears of its number of rows."""
        self._bus = bus
        self._cluster = cluster
        self._worker = worker
        self._backlog = backlog
        self._sent = sent
        self._apart_s = apart_s
        self._waiting: dict[str, _Columns] = {}
        self._wake = asyncio.Event()
        self._sending = asyncio.Lock()  # rows go out in order, whoever flushes

    def open(self, gateway: str, request: str, attempt: int) -> RowStream:
        return RowStream(self, gateway, request, attempt)

    def is_waiting(self, columns: _Columns, gateway: str) -> bool:
        """Not sent yet."""
        return self._waiting.get(gateway) is columns

    def columns(self, gateway: str) -> _Columns:
        columns = self._waiting.get(gateway)
        if columns is None:
            columns = self._waiting[gateway] = _Columns()
            self._wake.set()
        return columns

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        next_at = 0.0
        while True:
            await self._wake.wait()
            if (early_s := next_at - loop.time()) > 0:
                await asyncio.sleep(early_s)
            next_at = loop.time() + self._apart_s
            await self.flush()

    async def flush(self) -> None:
        """Send what is there."""
        async with self._sending:
            await self._flush()

    async def _flush(self) -> None:
        self._wake.clear()
        waiting, self._waiting = self._waiting, {}
        for gateway, columns in waiting.items():
            batch = wire.TokenBatch(worker=self._worker, backlog=self._backlog(), **vars(columns))
            try:
                await self._bus.publish(subjects.gateway(self._cluster, gateway), batch)
                self._sent(len(columns.requests))
            except BatonError as error:
                # The gateway sees a hole in the sequence.
                log.warning("batch of %d rows lost: %s", len(columns.requests), error.message)
