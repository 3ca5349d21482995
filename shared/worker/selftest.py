"""One real completion through a worker's own handlers and the bus, before it advertises itself."""

import asyncio
import random
import uuid

from shared import subjects, wire
from shared.bus import Bus
from shared.errors import EngineFailed, Timeout, from_wire
from shared.worker.engine import EngineInfo

TIMEOUT_S = 120.0
# Above 64 tokens the attention kernel takes the path that real prompts take; ids below 200 exist in any vocabulary.
PROMPT_TOKENS = 100
OUTPUT_TOKENS = 4


async def complete_once(bus: Bus, cluster: str, worker: str, takes: list[str], info: EngineInfo) -> None:
    """Raises a BatonError when any kind of work that is to be advertised does not come to its end."""
    count = min(PROMPT_TOKENS, info.max_model_len - OUTPUT_TOKENS - 1)
    tokens = wire.pack_tokens([random.randrange(1, 200) for _ in range(count)])  # noqa: S311
    if "prefill" in takes and info.splits:
        await _prefill(bus, cluster, worker, tokens)
    if "decode" in takes:
        await _decode(bus, cluster, worker, tokens)


async def _prefill(bus: Bus, cluster: str, worker: str, tokens: bytes) -> None:
    job = wire.PrefillJob(
        request=f"selftest-{uuid.uuid4().hex}",
        attempt=0,
        gateway="selftest",
        tokens=tokens,
        lease="",
        node="",
        timeout_s=TIMEOUT_S,
    )
    reply = await bus.request(subjects.selftest(cluster, "prefill", worker), job, wire.PrefillDone, timeout_s=TIMEOUT_S)
    if isinstance(reply, wire.Busy):
        raise EngineFailed(f"the worker refused its own test: {reply.reason}")


async def _decode(bus: Bus, cluster: str, worker: str, tokens: bytes) -> None:
    """The tokens come back over the bus to a gateway that exists only here."""
    gateway = subjects.selftest_gateway(uuid.uuid4().hex)
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_batch(message: wire.AnyMessage) -> None:
        if not isinstance(message, wire.TokenBatch) or ended.done():
            return
        for failure in message.failures.values():
            ended.set_exception(from_wire(failure.code, failure.message))
            return
        if message.finish:
            ended.set_result(None)

    subscription = await bus.listen(subjects.gateway(cluster, gateway), on_batch)
    await bus.flush()
    job = wire.DecodeJob(
        request=gateway,
        attempt=0,
        gateway=gateway,
        tokens=tokens,
        sampling=wire.Sampling(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True),
        prefill=False,
        timeout_s=TIMEOUT_S,
    )
    try:
        reply = await bus.request(subjects.selftest(cluster, "decode", worker), job, wire.Accepted, timeout_s=TIMEOUT_S)
        if isinstance(reply, wire.Busy):
            raise EngineFailed(f"the worker refused its own test: {reply.reason}")
        async with asyncio.timeout(TIMEOUT_S):
            await ended
    except TimeoutError:
        raise Timeout(f"the self-test gave no answer within {TIMEOUT_S:g} s") from None
    finally:
        await subscription.unsubscribe()
