"""`python -m loadtest connectors`: vLLM's NixlConnector beside ours, engine to engine, nothing else around them.

Two engines of one model on this machine. A prompt is computed by the one with `max_tokens=1`; as soon as its output is
here, the other gets the same prompt with the blocks to load. What is measured is the time from that output to the
other's first token, beside what that engine takes for the first token of a prompt that it has itself but for the last
token. Rounds alternate between prompt lengths. Needs `nixl` (`pip install --no-deps nixl nixl-cu12`) for that side.
"""

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from loadtest.cluster.stream import percentile
from shared import wire
from shared.kv.blocks import block_keys
from shared.kv.client import KvClient
from shared.worker.engine import KvPlan
from shared.worker.vllm_engine import EngineSettings, VllmEngine, set_environment

LENGTHS = (256, 1024, 4096)
BLOCK = 32
KV_BYTES = 1 << 30
WARM_UPS = 1
DEADLINE_S = 60.0
CONNECTORS = ("baton", "nixl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder, e.g. from `python -m loadtest model`")
    parser.add_argument("--connector", choices=CONNECTORS, action="append", help="default: both")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")


def run(args: argparse.Namespace) -> int:
    for connector in args.connector or CONNECTORS:
        rows = asyncio.run(_measure(connector, args))
        for length, (handoffs, alone) in rows.items():
            sys.stdout.write(
                f"{connector:6} {length:6} tokens: first token p50 {percentile(handoffs, 0.5):7.1f} ms, "
                f"p90 {percentile(handoffs, 0.9):7.1f} ms after prefill; "
                f"p50 {percentile(alone, 0.5):7.1f} with the blocks in its own cache\n"
            )
            sys.stdout.flush()
    return 0


async def _measure(connector: str, args: argparse.Namespace) -> dict[int, tuple[list[float], list[float]]]:
    rows: dict[int, tuple[list[float], list[float]]] = {length: ([], []) for length in args.lengths}
    pair = _baton(args) if connector == "baton" else _nixl(args)
    async with pair as (handoff, alone):
        for number in range(args.requests + WARM_UPS):
            for length in args.lengths:
                tokens = [random.randrange(10, 250) for _ in range(length)]
                async with asyncio.timeout(DEADLINE_S):
                    took_s, again_s = await handoff(tokens), await alone(tokens)
                sys.stderr.write(f"{connector}: round {number}, {length} tokens: {1e3 * took_s:.1f} ms\n")
                if number >= WARM_UPS:
                    rows[length][0].append(1e3 * took_s)
                    rows[length][1].append(1e3 * again_s)
    return rows


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    longest = max(args.lengths) + BLOCK
    return {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": longest,
        "block_size": BLOCK,
        "max_num_batched_tokens": longest,
        "enforce_eager": True,
    }


async def _first_token(llm: Any, tokens: list[int], transfer: dict[str, Any] | None, count: int) -> tuple[float, Any]:
    """When the first output came, and the last output."""
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    extra = {"kv_transfer_params": transfer} if transfer else None
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, extra_args=extra)
    first_s, last = 0.0, None
    async for output in llm.generate(tokens_input(tokens), params, uuid.uuid4().hex):
        first_s, last = first_s or time.perf_counter(), output
    return first_s, last


# ---- ours ---------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _baton(args: argparse.Namespace) -> AsyncIterator[Any]:
    from loadtest.micro import bench
    from services.launcher.machine import LOOPBACK, free_ports

    async with bench.opened() as here:
        _, nats_url = await here.nats()
        (probe_port,) = free_ports(1)
        path = str(here.folder / "kv.sock")
        settings = {
            "cluster": "loadtest",
            "id": "kv-0",
            "nats_url": nats_url,
            "redis_url": await here.redis(),
            "kv_socket": path,
            "arena_gib": 0.75,
            "probe_port": probe_port,
        }
        child = here.python("kv-0", "services.kv_transfer", settings=settings)
        await here.until_probed(child, f"http://{LOOPBACK}:{probe_port}")
        engines = [await _start(args, path, name) for name in ("p", "d")]
        clients = [KvClient(path, session=name, worker=name) for name in ("p", "d")]
        attached, _ = [await client.connect() for client in clients]

        async def plan(client: KvClient, tokens: list[int], *, save: bool) -> tuple[str, dict[str, Any]]:
            lease, geometry = uuid.uuid4().hex, attached.geometry
            keys = block_keys(wire.pack_tokens(tokens), BLOCK, fingerprint=geometry.fingerprint)
            slots = await client.reserve(lease=lease, request=lease, keys=keys, write=save, ttl_s=60)
            write = [not committed for committed in slots.committed]
            made = KvPlan(
                arena=attached.arena,
                lease=lease,
                slots=slots.slots,
                words=slots.words,
                load=0 if save else len(keys),
                save=save,
                write=write if save else [],
            )
            return lease, msgspec.to_builtins(made)

        async def handoff(tokens: list[int]) -> float:
            lease, transfer = await plan(clients[0], tokens, save=True)
            done_s, _ = await _first_token(engines[0]._llm, tokens, transfer, 1)  # noqa: SLF001
            reading, transfer = await plan(clients[1], tokens, save=False)
            first_s, _ = await _first_token(engines[1]._llm, tokens, transfer, 4)  # noqa: SLF001
            await clients[0].release(lease)
            await clients[1].release(reading)
            return first_s - done_s

        try:
            yield handoff, lambda tokens: _alone(engines[1]._llm, tokens)  # noqa: SLF001
        finally:
            for client in clients:
                await client.close()
            for engine in engines:
                await engine.close()


async def _alone(llm: Any, tokens: list[int]) -> float:
    began_s = time.perf_counter()
    return (await _first_token(llm, tokens, None, 4))[0] - began_s


async def _start(args: argparse.Namespace, socket: str, name: str) -> VllmEngine:
    arguments = _arguments(args)
    return await VllmEngine.start(
        EngineSettings(
            model=arguments.pop("model"),
            revision="",
            args=arguments,
            kv_bytes=KV_BYTES,
            kv_socket=socket,
            session=name,
            worker=name,
            cpu_cores=frozenset(),
        )
    )


# ---- theirs -------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _nixl(args: argparse.Namespace) -> AsyncIterator[Any]:
    from services.launcher.machine import free_ports

    set_environment(frozenset())
    os.environ.setdefault("UCX_TLS", "tcp,shm,self")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("VLLM_RPC_BASE_PATH", str(Path(folder)))
        engines = []
        for port in free_ports(2):
            os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
            engines.append(_start_nixl(args))

        async def handoff(tokens: list[int]) -> float:
            ask: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
            ask |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
            done_s, output = await _first_token(engines[0], tokens, ask, 1)
            first_s, _ = await _first_token(engines[1], tokens, output.kv_transfer_params, 4)
            return first_s - done_s

        try:
            yield handoff, lambda tokens: _alone(engines[1], tokens)
        finally:
            for engine in engines:
                engine.shutdown()


def _start_nixl(args: argparse.Namespace) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            **_arguments(args),
            kv_cache_memory_bytes=KV_BYTES,
            kv_transfer_config=transfer,
            distributed_executor_backend="uni",
        )
    )
