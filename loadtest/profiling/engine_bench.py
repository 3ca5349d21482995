"""This machine's own vLLM engine, given scenarios; what its steps did and took comes back from its step log."""

import asyncio
import math
import os
import random
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec

from loadtest.profiling.scenarios import Scenario
from loadtest.profiling.steps import EngineFacts, Step, read_log
from shared import wire
from shared.errors import BatonError, EngineFailed, SettingsError
from shared.worker.engine import EngineRequest
from shared.worker.vllm_engine import EngineSettings, VllmEngine, first_line, set_environment

SCENARIO_S = 120.0
WARM_UP = Scenario(decodes=(100, 100), steps=8, arrivals=((1000,), (100,)))
FIRST_TOKEN, LAST_TOKEN = 10, 200  # ids that exist in any vocabulary


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    engine_args: dict[str, Any]
    kv_bytes: int
    cores: frozenset[int]


class EngineBench:
    def __init__(self, engine: VllmEngine, log: Path, rng: random.Random) -> None:
        self._engine = engine
        self._log = log
        self._rng = rng
        self._seen = 0

    @property
    def facts(self) -> EngineFacts:
        return read_log(self._log)[0]

    @property
    def details(self) -> dict[str, Any]:
        return self._engine.info.details

    async def play(
        self, scenarios: Sequence[Scenario], until_s: float = math.inf, began: Callable[[], None] = lambda: None
    ) -> list[Step]:
        """The steps of the scenarios; those that would begin after `until_s`, by the monotonic clock, are left out."""
        for scenario in scenarios:
            if time.monotonic() > until_s:
                break
            began()
            await self._within_time(scenario)
        await self._prefill(1)  # the engine writes when it has nothing left to do: until then the log lacks the last
        steps = read_log(self._log)[1]
        new, self._seen = steps[self._seen : -1], len(steps)  # without the one of that last token
        return new

    async def _within_time(self, scenario: Scenario) -> None:
        try:
            async with asyncio.timeout(SCENARIO_S):
                await self._scenario(scenario)
        except TimeoutError as error:
            raise EngineFailed(f"the engine did not do {scenario} in {SCENARIO_S:g} s") from error
        except BaseExceptionGroup as group:
            if found := group.subgroup(BatonError):
                raise first_error(found) from group
            raise

    async def _scenario(self, scenario: Scenario) -> None:
        """Sequences that decode are ended when all of them have decoded enough and everything has arrived."""
        begun = [asyncio.Event() for _ in scenario.decodes]
        enough = [asyncio.Event() for _ in scenario.decodes]
        over = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for number, length in enumerate(scenario.decodes):
                tasks.create_task(self._decode(scenario, length, begun[number], enough[number], over))
            for event in begun:
                await event.wait()
            for group in scenario.arrivals:
                async with asyncio.TaskGroup() as prompts:
                    for length in group:
                        prompts.create_task(self._prefill(length))
            for event in enough:
                await event.wait()
            over.set()

    async def _prefill(self, length: int) -> None:
        async for _ in self._engine.generate(self._request(length, 1)):
            pass

    async def _decode(
        self, scenario: Scenario, length: int, begun: asyncio.Event, enough: asyncio.Event, over: asyncio.Event
    ) -> None:
        tokens = 0
        async with aclosing(self._engine.generate(self._request(length, scenario.longest_output))) as deltas:
            async for delta in deltas:
                tokens += len(delta.tokens)
                begun.set()
                if tokens > scenario.steps:
                    enough.set()
                if over.is_set():
                    break
        begun.set()
        enough.set()

    def _request(self, length: int, output: int) -> EngineRequest:
        """Random tokens: nothing is in the engine's prefix cache."""
        return EngineRequest(
            id=uuid.uuid4().hex,
            tokens=[self._rng.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)],
            sampling=wire.Sampling(max_tokens=output, temperature=0.0, ignore_eos=True),
        )


def first_error(group: BaseExceptionGroup[BatonError]) -> BatonError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return cast("BatonError", found)


@asynccontextmanager
async def running_engine(settings: BenchSettings, rng: random.Random) -> AsyncIterator[EngineBench]:
    """Raises SettingsError for a model or arguments that vLLM refuses."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings would cut through the progress
    set_environment(settings.cores)
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise SettingsError(f"vLLM cannot be imported here ({error}): run make setup") from error

    on_cpu = current_platform.is_cpu()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "steps"
        arguments: dict[str, Any] = {"enforce_eager": True} if on_cpu else {}  # as the launcher starts engines
        arguments |= settings.engine_args
        arguments["scheduler_cls"] = f"loadtest.profiling.step_log.Logged{'' if on_cpu else 'Async'}Scheduler"
        arguments["additional_config"] = {"step_log": str(log)}
        engine = await _start(settings, arguments, on_cpu=on_cpu)
        try:
            bench = EngineBench(engine, log, rng)
            await bench.play([WARM_UP])
            yield bench
        finally:
            await engine.close()


async def _start(settings: BenchSettings, arguments: dict[str, Any], *, on_cpu: bool) -> VllmEngine:
    try:
        return await VllmEngine.start(
            EngineSettings(
                model=settings.model,
                revision="",
                args=arguments,
                kv_bytes=settings.kv_bytes if on_cpu else 0,
                kv_socket="",
                session="",
                worker="profile",
                cpu_cores=settings.cores,
            )
        )
    except RuntimeError as error:  # so vLLM says that its engine process did not come up; why, it has printed itself
        raise SettingsError(f"vLLM did not start: {first_line(error)}") from error
