"""How a vLLM engine is asked to begin with given tokens: which processor it gets, and what a request says to it.

The processor forces one list of tokens; the choices of one request differ in theirs, so each goes to the engine as a
request of its own, with the seed that vLLM would have given it.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

import msgspec

from shared.worker.engine import EngineDelta, EngineRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXTRA_ARG = "baton_replay"  # of SamplingParams: packed ids
FORCING = "shared.worker.forcing:Forcing"
FORCING_V2 = "shared.worker.forcing_v2:ForcingV2"


def enable_forcing(config: "VllmConfig") -> bool:
    """Add the processor behind the user's own. False where vLLM takes none, or one step makes several tokens."""
    if (
        config.speculative_config is not None
        or config.num_speculative_tokens
        or config.model_config.return_sampling_mask
    ):
        return False
    name = FORCING_V2 if config.use_v2_model_runner else FORCING
    config.model_config.logits_processors = [*(config.model_config.logits_processors or []), name]
    return True


def one_by_one(request: EngineRequest) -> list[EngineRequest]:
    """A request for each choice. vLLM's ParentRequest gives choice i the seed + i."""
    sampling = request.sampling
    return [
        msgspec.structs.replace(
            request,
            id=f"{request.id}-{choice}",
            sampling=msgspec.structs.replace(
                sampling, n=1, seed=None if sampling.seed is None else sampling.seed + choice
            ),
            replay=[replay],
        )
        for choice, replay in enumerate(request.replay)
    ]


async def together(
    choices: Sequence[AsyncGenerator[EngineDelta, None]],
) -> AsyncGenerator[EngineDelta, None]:
    """Deltas of several requests as the choices of one. Raises what the first fails with; closing it closes all."""
    arrived: asyncio.Queue[EngineDelta | BaseException | None] = asyncio.Queue(maxsize=len(choices))
    tasks = [asyncio.create_task(_forward(number, deltas, arrived)) for number, deltas in enumerate(choices)]
    try:
        still_open = len(tasks)
        while still_open:
            item = await arrived.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                still_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    number: int,
    deltas: AsyncGenerator[EngineDelta, None],
    arrived: "asyncio.Queue[EngineDelta | BaseException | None]",
) -> None:
    end: BaseException | None = None
    try:
        async with aclosing(deltas):
            async for delta in deltas:
                await arrived.put(msgspec.structs.replace(delta, choice=number))
    except Exception as error:  # noqa: BLE001 - raised again where the deltas are read
        end = error
    await arrived.put(end)
