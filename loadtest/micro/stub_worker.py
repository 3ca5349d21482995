"""A worker that keeps the wire contract and has no engine: what is left is the token path.

`python -m loadtest.micro.stub_worker CLUSTER ROLE ID NATS_URL FOLDER STEP_MS`. Jobs, beats and batches are as a real
worker's, and the batches are sent by the same code. A prefill job is done at once: it tells the decode worker so
through a datagram in FOLDER, where a store would. Each step gives every running request one token; STEP_MS 0: as fast
as it goes.
"""

import asyncio
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import uvloop
from opentelemetry import trace
from opentelemetry.context import Context
from prometheus_client import CollectorRegistry

from loadtest.load.alarm import Pace
from shared import subjects, telemetry, wire
from shared.bus import Bus
from shared.span_sender import SpanSender
from shared.worker.batches import Batches, RowStream
from shared.worker.engine import EngineDelta

BEAT_S = 0.2
MAX_MODEL_LEN = 8192
MAX_RUNNING = 1 << 16  # the token path is measured, not the queue
BLOCK_SIZE = 16
PREFILL_TOKENS_PER_S = 1e6  # a prompt is done at once: nobody has to wait for another
DATAGRAM_BYTES = 512
TOKENS = [(100 + number, f" w{number % 10}") for number in range(64)]


@dataclass(slots=True)
class _Running:
    stream: RowStream
    left: int
    given: int = 0
    span: trace.Span = trace.INVALID_SPAN


class StubWorker:
    """Answers decode, prefill, cancel and ping subjects of one id until cancelled."""

    def __init__(self, cluster: str, role: str, worker: str, folder: Path, step_s: float) -> None:
        self._cluster = cluster
        self._role = role
        self._id = worker
        self._folder = folder
        self._step_s = step_s
        self._running: dict[tuple[str, int], _Running] = {}
        self._waiting: dict[str, tuple[tuple[str, int], _Running]] = {}  # by lease
        self._work = asyncio.Event()
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._door.setblocking(False)
        self._incarnation = uuid.uuid4().hex

    async def run(self, nats_url: str) -> None:
        bus = self._bus = await Bus.connect(nats_url, self._id)
        self._batches = Batches(bus, self._cluster, self._id, backlog=self._backlog, sent=lambda _rows: None)
        self._door.bind(str(self._folder / f"{self._id}.door"))
        asyncio.get_running_loop().add_reader(self._door, self._open)
        if self._role == "decode":
            await bus.serve(subjects.decode(self._cluster, self._id), self._decode)
        else:
            await bus.serve(subjects.prefill(self._cluster, self._id), self._prefill)
        await bus.serve(subjects.cancel(self._cluster, self._id), self._cancel)
        await bus.serve(subjects.ping(self._cluster, self._id), self._ping)
        # Spans as a real worker's and its store's: there are none for a gateway without telemetry.
        spans = SpanSender(self._role, self._id, CollectorRegistry())
        telemetry.start().others = spans.take
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(spans.run(bus, self._cluster))
            tasks.create_task(self._beat(bus))
            tasks.create_task(self._steps())

    # ---- jobs ------------------------------------------------------------------------------------------------

    async def _decode(self, job: wire.AnyMessage, parent: Context) -> wire.Message:
        if not isinstance(job, wire.DecodeJob):
            raise TypeError(f"a decode subject got {type(job).__name__}")
        key, lease = (job.request, job.attempt), f"{self._id}:{job.request}:{job.attempt}"
        running = _Running(self._batches.open(job.gateway, *key), job.sampling.max_tokens)
        running.span = telemetry.tracer().start_span(telemetry.DECODE_JOB, context=parent)
        if job.prefill:
            self._waiting[lease] = (key, running)
            subject = subjects.prefill(self._cluster, job.prefill_worker)
            message = wire.prefill_job(job, lease=lease, node="node-0")
            await self._bus.publish(subject, message, reply=job.prefill_reply, headers=telemetry.inject(parent))
        else:
            self._begin(key, running)
        return wire.Accepted(
            request=job.request,
            attempt=job.attempt,
            node="node-0",
            lease=lease,
            asked_prefill=job.prefill,
            backlog=self._backlog(),
        )

    async def _prefill(self, job: wire.AnyMessage, parent: Context) -> wire.Message:
        if not isinstance(job, wire.PrefillJob):
            raise TypeError(f"a prefill subject got {type(job).__name__}")
        decode = job.lease.partition(":")[0]
        with telemetry.tracer().start_as_current_span(telemetry.PREFILL_JOB, context=parent):
            self._door.sendto(job.lease.encode(), str(self._folder / f"{decode}.door"))
            telemetry.tracer().start_span(telemetry.KV_PUSH).end()
        return wire.PrefillDone(request=job.request, attempt=job.attempt, backlog=self._backlog())

    async def _cancel(self, message: wire.AnyMessage, _: Context) -> wire.Message:
        if isinstance(message, wire.Cancel):
            self._running.pop((message.request, message.attempt), None)
            self._waiting.pop(f"{self._id}:{message.request}:{message.attempt}", None)
        return wire.Done()

    async def _ping(self, _: wire.AnyMessage, __: Context) -> wire.Message:
        return wire.Pong(id=self._id)

    def _open(self) -> None:
        """Blocks have been committed: their requests begin with the next step."""
        while True:
            try:
                lease = self._door.recv(DATAGRAM_BYTES).decode()
            except BlockingIOError:
                return
            found = self._waiting.pop(lease, None)
            if found is not None:  # else it was cancelled
                self._begin(*found)

    def _begin(self, key: tuple[str, int], running: _Running) -> None:
        self._running[key] = running
        self._work.set()

    # ---- the engine that is not there --------------------------------------------------------------------------

    async def _steps(self) -> None:
        due, pace = time.monotonic(), Pace()
        while True:
            if not self._running:
                self._work.clear()
                await self._work.wait()
                due = max(due, time.monotonic())
            if self._step_s:
                due += self._step_s
                await pace.until(due)
            self._step()
            await self._batches.flush()
            if not self._step_s:
                await asyncio.sleep(0)  # messages have come meanwhile

    def _step(self) -> None:
        """One token for each."""
        for key, running in list(self._running.items()):
            token, text = TOKENS[running.given % len(TOKENS)]
            running.given += 1
            if running.given == 1:
                for name in (telemetry.KV_LOAD, telemetry.DECODE_FIRST_TOKEN):
                    telemetry.tracer().start_span(name, context=trace.set_span_in_context(running.span)).end()
            if running.given < running.left:
                running.stream.delta(EngineDelta(choice=0, text=text, tokens=[token]))
                continue
            del self._running[key]
            running.span.end()
            finish = wire.Finish(reason="length")
            usage = wire.DecodeUsage(completion_tokens=running.given)
            running.stream.delta(EngineDelta(choice=0, text=text, tokens=[token], finish=finish), usage)

    def _backlog(self) -> wire.Backlog:
        return wire.Backlog(running=len(self._running), waiting=len(self._waiting))

    async def _beat(self, bus: Bus) -> None:
        subject = subjects.beat(self._cluster, self._role, self._id)
        while True:
            await bus.publish(
                subject,
                wire.Heartbeat(
                    role=self._role,
                    id=self._id,
                    incarnation=self._incarnation,
                    takes=[self._role],
                    node="node-0",
                    engine="stub",
                    max_model_len=MAX_MODEL_LEN,
                    block_size=BLOCK_SIZE,
                    backlog=self._backlog(),
                    max_running=MAX_RUNNING,
                    prefill_tokens_per_s=PREFILL_TOKENS_PER_S,
                ),
            )
            await asyncio.sleep(BEAT_S)


if __name__ == "__main__":
    cluster, role, worker, nats_url, folder, step_ms = sys.argv[1:]
    uvloop.run(StubWorker(cluster, role, worker, Path(folder), float(step_ms) / 1e3).run(nats_url))
