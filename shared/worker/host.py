"""The process of a worker, whatever its role: one engine, both job handlers, and what it tells the cluster.

A prefill worker and a decode worker differ in what they advertise (`takes`), nothing else. A worker advertises itself
only after a real completion through its own handlers. SIGTERM drains; a dead engine or an unhealthy KV client ends
the process, because a new one is the way back. Whatever hangs while it ends does so for END_S at most: a worker that
gives its node's memory back late keeps the next one from starting.

So does an engine that is wedged: no sign of life for `wedge_s`. From half of that on `/ready` answers 503 and nothing
is advertised, so that nothing new is placed here; then the worker gives its jobs one clear failure and exits with 1,
which the launcher and Kubernetes alike answer with a restart and back-off. `/health` stays 200: it says that this
process answers, and a liveness probe on it is for the one case that the process cannot see itself, its own loop
standing still. If it failed for a wedged engine too, the probe would kill the host before the jobs had their answer.
"""

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import time
import uuid
from contextlib import AsyncExitStack

import uvloop

from shared import subjects, telemetry, wire
from shared.bus import Bus
from shared.bus_metrics import BusMetrics
from shared.errors import BatonError, Draining, EngineFailed, SettingsError
from shared.exposition import serve_metrics
from shared.kv.client import KvClient
from shared.loop_lag import LoopLag
from shared.probes import Probes
from shared.settings import WorkerSettings, load, served_name, shown
from shared.span_sender import SpanSender
from shared.version import VERSION
from shared.worker.batches import Batches
from shared.worker.context import WorkerContext
from shared.worker.decode import DecodeHandler
from shared.worker.engine import Engine
from shared.worker.gateways import Gateways
from shared.worker.gpu import watch_gpus
from shared.worker.jobs import Jobs
from shared.worker.metrics import WorkerMetrics
from shared.worker.neighbours import Neighbours
from shared.worker.prefill import PrefillHandler
from shared.worker.pulling import Pulling
from shared.worker.rates import Prompts
from shared.worker.selftest import complete_once
from shared.worker.sim.engine import SimEngine, SimSettings
from shared.worker.vllm_engine import EngineSettings, VllmEngine
from shared.worker.vllm_telemetry import EngineMetrics

log = logging.getLogger(__name__)

BEAT_S = 0.2
ENGINE_CHECK_S = 1.0
LAST_WORDS_S = 2.0
END_S = 20.0  # from the end of the drain to that of the process; an engine that does not end by itself takes 5
BYTES_PER_GIB = 1 << 30
GC_THRESHOLD = (50_000, 20, 50)  # jobs leave no cycles to speak of, and a collection holds up every stream


def main(role: str) -> None:
    """Run a worker until SIGTERM; exit code 0 after a drain, 1 after a failure, 2 for bad settings."""
    try:
        settings = load(WorkerSettings)
        takes = takes_of(settings, role)
        telemetry.start_logs(role, settings.id, log_format=settings.log_format, level=settings.log_level)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(WorkerHost(settings, role, takes).run())
    except SettingsError as error:
        print(f"baton {role}: {error}", file=sys.stderr)
        code = 2
    except BatonError as error:
        print(f"baton {role}: {error.message}", file=sys.stderr)
        code = 1
    sys.exit(code)


class WorkerHost:
    """Composition root and life of one worker process."""

    def __init__(self, settings: WorkerSettings, role: str, takes: list[str]) -> None:
        self._settings = settings
        self._role = role
        self._takes = takes
        self._incarnation = uuid.uuid4().hex
        self._state = "starting"
        self._stop = asyncio.Event()
        self._failed = ""
        self._silent_s = 0.0  # the engine, by the last look
        self._metrics = WorkerMetrics()
        self._gateways = Gateways(settings.id)
        self._spans = SpanSender(role, settings.id, self._metrics.registry)

    async def run(self) -> int:
        """Returns the exit code."""
        settings = self._settings
        log.info("settings: %s", shown(settings))
        recorder = telemetry.start(enabled=settings.telemetry == "on")
        recorder.others = self._spans.take
        async with AsyncExitStack() as stack:
            probes = Probes(self._metrics.registry, self._why_not_ready)
            await probes.start(settings.probe_host, settings.probe_port)
            stack.push_async_callback(probes.close)
            bus = await Bus.open(settings, settings.id)
            stack.push_async_callback(bus.close)
            neighbours = await Neighbours.listen(bus, settings.cluster)
            engine = await self._start_engine(stack)
            LoopLag(self._metrics.registry).start()  # loading an engine holds the loop up, and nobody waits for it yet
            await neighbours.check(served_name(settings.model, settings.served_model_name))
            kv = KvClient(settings.kv_socket, session=self._incarnation, worker=settings.id, on_unhealthy=self._fail)
            batches = Batches(
                bus,
                settings.cluster,
                settings.id,
                backlog=lambda: context.backlog(),  # noqa: PLW0108 - made below
                sent=self._metrics.batch_size.observe,
            )
            context = WorkerContext(
                id=settings.id,
                node=settings.node,
                engine=engine,
                kv=kv,
                jobs=Jobs(),
                metrics=self._metrics,
                batches=batches,
                bus=bus,
                cluster=settings.cluster,
                reserve_s=settings.reserve_s,
                lease_s=settings.lease_s,
                prompts=Prompts(step_limit=engine.info.step_tokens),
                pulling=Pulling(bus, settings.cluster, settings.node, kv, self._metrics, settings.pull),
            )
            if settings.kv_socket and engine.info.splits:
                await kv.connect()
                stack.push_async_callback(kv.close)
            await self._serve(bus, context, probes)
        if self._failed:
            log.error("stopping: %s", self._failed)
        return 1 if self._failed else 0

    async def _start_engine(self, stack: AsyncExitStack) -> Engine:
        settings = self._settings
        started = time.monotonic()
        log.info("loading %s", settings.model)
        engine = await (self._start_sim() if settings.engine == "sim" else self._start_vllm())
        stack.push_async_callback(engine.close)
        info = engine.info
        facts = {"engine": info.name, "max_model_len": info.max_model_len, **info.details}
        self._metrics.engine.info({key: str(value) for key, value in facts.items()})
        log.info("engine ready after %.1f s: %s", time.monotonic() - started, info)
        return engine

    async def _start_vllm(self) -> Engine:
        settings = self._settings
        self._metrics.registry.register(EngineMetrics())
        watch_gpus(self._metrics.registry)
        return await VllmEngine.start(
            EngineSettings(
                model=settings.model,
                revision=settings.revision,
                # The name in vLLM's own metrics; else it would be the model's path.
                args={
                    "served_model_name": served_name(settings.model, settings.served_model_name),
                    **settings.engine_args,
                },
                kv_bytes=int(settings.kv_gib * BYTES_PER_GIB),
                kv_socket=settings.kv_socket,
                session=self._incarnation,
                worker=settings.id,
                cpu_cores=cores_of(settings.cpu_cores),
            )
        )

    async def _start_sim(self) -> Engine:
        settings = self._settings
        return await SimEngine.start(
            SimSettings(
                model=settings.model,
                revision=settings.revision,
                args=settings.engine_args,
                kv_bytes=int(settings.kv_gib * BYTES_PER_GIB),
                kv_socket=settings.kv_socket,
                session=self._incarnation,
                worker=settings.id,
                speed=settings.sim_speed,
                has_kv=settings.sim_kv == "on",
            ),
            self._metrics.registry,
        )

    async def _serve(self, bus: Bus, context: WorkerContext, probes: Probes) -> None:
        """From the engine's readiness to the end of the drain."""
        settings, cluster = self._settings, self._settings.cluster
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(context.batches.run()),
                tasks.create_task(self._watch(bus, context)),
                tasks.create_task(self._spans.run(bus, cluster)),
                tasks.create_task(BusMetrics(self._metrics.registry).run(bus)),
            ]
            # Both handlers always run: a role is what is advertised.
            decode = DecodeHandler(context, context.engine.info.max_running + settings.max_waiting)
            prefill = PrefillHandler(context, settings.prefill_jobs + settings.max_waiting)
            await bus.take(subjects.decode(cluster, settings.id), decode)
            await bus.take(subjects.prefill(cluster, settings.id), prefill)
            tests = [
                await bus.take(subjects.selftest(cluster, "decode", settings.id), decode),
                await bus.take(subjects.selftest(cluster, "prefill", settings.id), prefill),
            ]
            await bus.serve(subjects.cancel(cluster, settings.id), self._cancel(context))
            await bus.serve(subjects.ping(cluster, settings.id), self._pong)
            await serve_metrics(bus, cluster, self._role, settings.id, self._metrics.registry)
            for beats in (subjects.beats(cluster, "gateway"), subjects.beat(cluster, self._role, settings.id)):
                await bus.listen(beats, lambda beat: self._hear(beat, context.jobs))
            await bus.flush()
            try:
                await complete_once(bus, cluster, settings.id, self._takes, context.engine.info)
            except BatonError as error:
                self._fail(f"the self-test failed: {error.message}")
            else:
                for test in tests:
                    await test.unsubscribe()
                context.forget_speeds()
                gc.collect()
                gc.freeze()  # what is here now stays: engine, tables, tokenizer; later collections pass it by
                gc.set_threshold(*GC_THRESHOLD)
                self._state = "ready"
                log.info("ready: takes %s", ", ".join(self._takes))
                running.append(tasks.create_task(self._beat(bus, context, probes.url)))
                await self._stop.wait()
                await self._drain(bus, context)
            # What hangs from here on is told, every thread with its stack, and ends with the process.
            faulthandler.dump_traceback_later(END_S, exit=True)
            for task in running:
                task.cancel()
            await self._spans.flush(bus, cluster)

    async def _drain(self, bus: Bus, context: WorkerContext) -> None:
        """Refuse new jobs, let the running ones end within the grace period, end the rest with a clear error."""
        self._state = "draining"
        context.draining = True
        if context.jobs and not self._failed:
            log.info("draining %d jobs, %g s at most", len(context.jobs), self._settings.drain_s)
        if self._failed:
            await context.jobs.drain(0, EngineFailed("the worker's engine failed"))
        else:
            await context.jobs.drain(self._settings.drain_s, Draining("this worker is shutting down"))
        await context.batches.flush()
        with contextlib.suppress(BatonError, TimeoutError):  # the bus is away, and with it everybody who waits
            async with asyncio.timeout(LAST_WORDS_S):
                await bus.flush()  # before the store says that this worker has gone

    async def _beat(self, bus: Bus, context: WorkerContext, metrics_url: str) -> None:
        subject = subjects.beat(self._settings.cluster, self._role, self._settings.id)
        while True:
            try:
                await bus.publish(subject, self._heartbeat(context, metrics_url))
            except BatonError as error:
                log.debug("beat lost: %s", error.message)
            await asyncio.sleep(BEAT_S)

    def _heartbeat(self, context: WorkerContext, metrics_url: str) -> wire.Heartbeat:
        settings, info, load_now = self._settings, context.engine.info, context.engine.load()
        attached = context.kv.attached
        prompt_s, token_s = context.prompts.line.terms()
        load_s, load_token_s = context.loads.terms()
        takes = [] if self._why_not_ready() else self._takes
        if not info.splits:
            takes = [work for work in takes if work == "decode"]
        self._show(context)
        return wire.Heartbeat(
            role=self._role,
            id=settings.id,
            incarnation=self._incarnation,
            state=self._state,
            takes=takes,
            node=settings.node,
            engine=info.name,
            model=served_name(settings.model, settings.served_model_name),
            max_model_len=info.max_model_len,
            block_size=attached.geometry.block_size if attached else 0,
            fingerprint=attached.geometry.fingerprint if attached else "",
            backlog=context.backlog(),
            max_running=info.max_running if "decode" in self._takes else settings.prefill_jobs,
            max_waiting=settings.max_waiting,
            kv_usage=load_now.kv_usage,
            kv_tokens=info.kv_tokens,
            kv_promised=context.kv_promised,
            prefill_tokens_per_s=1 / token_s if token_s > 0 else 0.0,
            prefill_prompt_s=prompt_s,
            load_s=load_s,
            load_token_s=load_token_s,
            decode_step_s=load_now.decode_step_s,
            decode_sequence_s=load_now.decode_sequence_s,
            forces=info.forces,
            metrics_url=metrics_url,
            version=VERSION,
        )

    def _show(self, context: WorkerContext) -> None:
        metrics, load_now = self._metrics, context.engine.load()
        metrics.jobs.set(len(context.jobs))
        metrics.running.set(load_now.running)
        metrics.waiting.set(load_now.waiting)
        metrics.kv_usage.set(load_now.kv_usage)
        metrics.preemptions.set(load_now.preemptions)
        metrics.computed_prompt_tokens.set(load_now.computed_prompt_tokens)

    async def _watch(self, bus: Bus, context: WorkerContext) -> None:
        """A dead or wedged engine ends the worker: the launcher or Kubernetes starts a new one."""
        while True:
            try:
                await context.engine.check_health()
            except BatonError as error:
                self._fail(error.message)
            self._judge(context.engine.silent_s())
            for gateway in self._gateways.check(time.monotonic()):
                self._abandon(gateway, context.jobs)
            self._metrics.bad_messages.set(bus.bad_messages)
            await asyncio.sleep(ENGINE_CHECK_S)

    def _hear(self, beat: wire.AnyMessage, jobs: Jobs) -> None:
        if isinstance(beat, wire.Heartbeat) and self._gateways.hear(beat, time.monotonic()):
            self._abandon(beat.id, jobs)

    def _abandon(self, gateway: str, jobs: Jobs) -> None:
        """Nobody reads their tokens any more."""
        if orphans := jobs.abandon(gateway):
            log.warning("%s has died: its %d jobs are stopped", gateway, orphans)
            self._metrics.orphaned_jobs.inc(orphans)

    def _judge(self, silent_s: float) -> None:
        # Before it is ready the self-test has a deadline of its own; a first step may compile for long.
        if self._state == "starting":
            return
        was_wedged, self._silent_s = self._is_wedged, silent_s
        if self._is_wedged and not was_wedged:
            log.warning("the engine has given no sign of life for %.0f s: nothing new is taken", silent_s)
        elif was_wedged and not self._is_wedged:
            log.info("the engine goes on")
        if silent_s > self._settings.wedge_s:
            self._fail(f"the engine is wedged: no sign of life for {silent_s:.0f} s")

    @property
    def _is_wedged(self) -> bool:
        return self._silent_s > self._settings.wedge_s / 2

    def _cancel(self, context: WorkerContext):  # type: ignore[no-untyped-def]  # noqa: ANN202
        async def on_cancel(message: wire.AnyMessage, _: object) -> wire.Message:
            if isinstance(message, wire.Cancel):
                await context.jobs.cancel((message.request, message.attempt), time.monotonic())
            return wire.Done()

        return on_cancel

    async def _pong(self, _: wire.AnyMessage, __: object) -> wire.Message:
        return wire.Pong(id=self._settings.id)

    def _fail(self, reason: str) -> None:
        self._failed = self._failed or reason
        self._stop.set()

    def _why_not_ready(self) -> str | None:
        if self._state == "ready" and self._is_wedged:
            return f"wedged: the engine has given no sign of life for {self._silent_s:.0f} s"
        return None if self._state == "ready" else self._state


def takes_of(settings: WorkerSettings, role: str) -> list[str]:
    """The work that is advertised. Raises SettingsError."""
    takes = settings.takes or [role]
    if unknown := set(takes) - {"prefill", "decode"}:
        raise SettingsError(f"setting 'takes': unknown work {sorted(unknown)}: choose from prefill, decode")
    return takes


def cores_of(text: str) -> frozenset[int]:
    """`0,2-3` as a set. Raises SettingsError."""
    cores: set[int] = set()
    try:
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            cores.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise SettingsError(f"setting 'cpu_cores': cannot read {text!r}: write e.g. 0 or 0,2-3") from None
    if missing := cores - set(range(os.cpu_count() or 1)):
        raise SettingsError(f"setting 'cpu_cores': this machine has no core {min(missing)}")
    return frozenset(cores)
