"""One cluster's life: brokers, then the KV store, then engines and gateway together; watched; stopped in order.

Invariants: whoever calls `start` calls `stop` or `kill`; after either no process, socket or shared-memory file of the
cluster is left. cluster.json says at any time which processes there are.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from services.launcher import brokers
from services.launcher.health import probe_client, until_deaf, until_ready
from services.launcher.plan import Plan, Process
from services.launcher.processes import Child, Children, ending
from services.launcher.progress import Progress
from services.launcher.refusal import UserError
from services.launcher.restarts import Restarts
from services.launcher.state import ClusterFolder, ClusterRecord, ServiceRecord, born, own_identity
from services.launcher.sweep import ORDER, remove_files
from shared.settings import to_environ

# Who must answer before whom is started. Engines wait a minute for their store, and load meanwhile: so a store whose
# arena is quickly faulted in starts with them.
TIERS = (("nats", "redis"), ("kv", "prefill", "decode", "gateway"))
TIERS_BIG_ARENA = (("nats", "redis"), ("kv",), ("prefill", "decode", "gateway"))
BIG_ARENA_GIB = 4.0
WORKERS = ("prefill", "decode")
START_S = {"nats": 20.0, "redis": 20.0, "kv": 120.0}
ENGINE_START_S = 3600.0  # a large model on a slow disk
OVER_DRAIN_S = 15.0  # beyond a process's own grace: ending an engine and its interpreter takes up to 8 s
TICK_S = 1.0


class Cluster:
    def __init__(self, plan: Plan, folder: ClusterFolder, environ: Mapping[str, str], progress: Progress) -> None:
        self._plan = plan
        self._folder = folder
        self._progress = progress
        self._children = Children(environ)
        self._running: dict[str, Child] = {}
        self._probes = probe_client()
        self._served = False
        self.record = _new_record(plan)
        self._services = {service.id: service for service in self.record.services}

    async def start(self) -> None:
        """Returns when every process is ready. Raises UserError as soon as one ends."""
        self._folder.write(self.record)
        brokers.write_nats_config(self._plan)
        async with self._ticking():
            for roles in self._tiers():
                await self._bring_up([process for process in self._plan.processes if process.role in roles])
        self._served = self.record.started = True
        self._folder.write(self.record)

    async def keep(self) -> None:
        """Start again whatever ends, with back-off. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            for process in self._plan.processes:
                group.create_task(self._keep(process))

    async def stop(self) -> None:
        """Drain tier by tier. Every process gets its own grace period and a little more, then SIGKILL."""
        async with self._ticking():
            for roles in ORDER:
                tier = [child for child in self._running.values() if child.process.role in roles]
                await asyncio.gather(*(self._stop(child) for child in tier))
        await self._ended()

    async def kill(self) -> None:
        """At once."""
        self._children.kill_all()
        await self._children.all_exited()
        await self._ended()

    async def _ended(self) -> None:
        await self._probes.aclose()
        remove_files(self.record)
        self._folder.forget()

    def _tiers(self) -> tuple[tuple[str, ...], ...]:
        arenas = [process.settings["arena_gib"] for process in self._plan.processes if process.role == "kv"]
        return TIERS_BIG_ARENA if max(arenas) > BIG_ARENA_GIB else TIERS

    async def _bring_up(self, tier: Iterable[Process]) -> None:
        children = [self._start(process) for process in tier]
        waits = [asyncio.create_task(self._until_up(child)) for child in children]
        try:
            await asyncio.gather(*waits)  # the first UserError ends it
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _start(self, process: Process) -> Child:
        child = self._children.start(process, to_environ(process.settings), self._folder.log(process.id))
        self._running[process.id] = child
        service = self._services[process.id]
        service.pid, service.born, service.state = child.pid, born(child.pid), "starting"
        self._folder.write(self.record)
        self._say(process, "starting")
        return child

    async def _until_up(self, child: Child) -> None:
        """Raises UserError when it ends instead, or takes far too long."""
        process = child.process
        limit_s = START_S.get(process.role, ENGINE_START_S)
        answers = asyncio.create_task(self._until_answers(process))
        try:
            waits: set[asyncio.Future[Any]] = {answers, child.exited}
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if child.exited.done():
                raise UserError(
                    f"{process.id} ended while starting ({ending(child.exited.result())}): "
                    f"{child.last_words() or 'it said nothing'} (log: {child.log})"
                )
            if not answers.done():
                raise UserError(f"{process.id} was not ready within {limit_s:.0f} s (log: {child.log})")
            answers.result()
        finally:
            answers.cancel()
            self._progress.done(process.id, "ready" if answers.done() and not answers.cancelled() else "")
        self._set(process, "ready")

    def _until_answers(self, process: Process) -> Coroutine[None, None, None]:
        if process.role == "nats":
            return brokers.until_nats_answers(self._plan.nats_port)
        if process.role == "redis":
            return brokers.until_redis_answers(self._plan.redis_socket)
        silence = "loading the engine" if process.role in WORKERS else "starting"
        return until_ready(self._probes, process.probe_url, lambda reason: self._say(process, reason or silence))

    def _say(self, process: Process, what: str) -> None:
        states = {service.state for service in self.record.services if service.role in WORKERS}
        if process.role != "gateway" or "starting" not in states:  # until then it only waits for them
            self._progress.begin(process.id, what)

    async def _keep(self, process: Process) -> None:
        backoff = Restarts()
        while True:
            child = self._running[process.id]
            code = await self._end_of(child)
            self._set(process, "lost")
            what = f"{process.id} died ({ending(code)}; log: {child.log})"
            delay_s = backoff.after_death(time.monotonic() - child.started_s)
            if delay_s is None:
                self._set(process, "stopped")
                self._progress.line(f"{what}: given up after {backoff.deaths} deaths soon after start")
                return
            self._progress.line(f"{what}: starting it again in {delay_s:.0f} s")
            await asyncio.sleep(delay_s)
            self._start(process)
            try:
                await self._until_up(self._running[process.id])
            except UserError:
                continue  # the loop says it
            self._progress.line(f"{process.id} is back")

    async def _end_of(self, child: Child) -> int:
        """What a liveness probe does elsewhere: a process that answers nobody any more is killed."""
        process = child.process
        if process.probe_url:
            deaf = asyncio.create_task(until_deaf(self._probes, process.probe_url))
            waits: set[asyncio.Future[Any]] = {deaf, child.exited}
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if not child.exited.done():
                    deaf.result()
                    self._progress.line(f"{process.id} gives no answer: killed")
                    child.signal_group(signal.SIGKILL)
            finally:
                deaf.cancel()
        return await child.wait()

    async def _stop(self, child: Child) -> None:
        process = child.process
        if not child.exited.done():
            self._set(process, "draining")
            self._progress.begin(process.id, "draining")
            # Before anything was served there is nothing to wait for.
            limit_s = OVER_DRAIN_S + (process.drain_s if self._served else 0.0)
            if not await child.stop(limit_s):
                self._progress.line(f"{process.id} did not end within {limit_s:.0f} s: killed")
        self._progress.done(process.id)
        self._set(process, "stopped")

    def _set(self, process: Process, state: str) -> None:
        self._services[process.id].state = state
        self._folder.write(self.record)

    @asynccontextmanager
    async def _ticking(self) -> AsyncIterator[None]:
        async def tick() -> None:
            while True:
                await asyncio.sleep(TICK_S)
                self._progress.tick()

        ticker = asyncio.create_task(tick())
        try:
            yield
        finally:
            ticker.cancel()


def _new_record(plan: Plan) -> ClusterRecord:
    pid, since = own_identity()
    return ClusterRecord(
        cluster=plan.cluster,
        address=plan.address,
        model=plan.served_model_name,
        model_path=plan.model_path,
        arrangement=plan.arrangement,
        pid=pid,
        born=since,
        run_folder=plan.place.run_folder,
        shm_dir=plan.shm_dir,
        nats_url=plan.nats_url,
        services=[
            ServiceRecord(
                role=process.role,
                id=process.id,
                node=process.node,
                probe_url=process.probe_url,
                settings=process.settings,
            )
            for process in plan.processes
        ],
    )
