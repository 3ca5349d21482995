"""How long a hand-off takes: from the end of prefill's computation to the blocks in decode's pages.

Read from the cluster's own spans: `kv.push` begins when the last step of prefill has been computed (one chunk a
prompt: keep it below the engine's token budget) and `kv.load` ends when decode's engine has copied the blocks in.
Start the cluster with OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:PORT and OTEL_BSP_SCHEDULE_DELAY=500.
The plain memcpy of the same bytes is measured in the same run; two of them are the limit of any copy through memory.
"""

import argparse
import asyncio
import random
import secrets
import time

import httpx

from loadtest.cluster.otlp import Receiver, Span
from loadtest.cluster.stream import complete, percentile, random_prompt
from loadtest.micro.limits import memcpy_s

SPANS = {"kv.push", "kv.load", "prefill.job", "decode.first_token"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url")
    parser.add_argument("--port", type=int, default=4318, help="where the cluster sends its spans")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--requests", type=int, default=20)


def run(args: argparse.Namespace) -> int:
    with Receiver(args.port) as receiver:
        traces = asyncio.run(_requests(args, receiver))
    rows = [row for row in map(_row, traces) if row]
    if not rows:
        print("no hand-off was seen: is the cluster split, and does it send its spans here?")
        return 1
    size_bytes = int(percentile([row["bytes"] for row in rows], 0.5))
    memcpy_ms = 1e3 * memcpy_s(size_bytes)
    names = ("hand-off", "copy out", "notice", "copy in", "first token")
    print(
        f"{len(rows)} hand-offs of {size_bytes / 2**20:.1f} MiB; one memcpy of it {memcpy_ms:.2f} ms; p50 / p90 in ms:"
    )
    for name in names:
        values = [row[name] for row in rows]
        print(f"  {name:12} {percentile(values, 0.5):7.2f} {percentile(values, 0.9):7.2f}")
    handoff = percentile([row["hand-off"] for row in rows], 0.5)
    print(f"  hand-off / two memcpys: {handoff / (2 * memcpy_ms):.2f}")
    return 0


async def _requests(args: argparse.Namespace, receiver: Receiver) -> list[list[Span]]:
    rng = random.Random(time.time_ns())
    traces = []
    async with httpx.AsyncClient(base_url=args.url, timeout=120) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        for _ in range(args.requests + 2):
            trace_id = secrets.token_hex(16)
            headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
            await complete(client, model, random_prompt(args.prompt_tokens, rng), 8, headers)
            traces.append(trace_id)
        return [await asyncio.to_thread(receiver.wait_for, trace_id, SPANS) for trace_id in traces[2:]]


def _row(spans: list[Span]) -> dict[str, float] | None:
    """Milliseconds of one request's hand-off; None unless all spans came."""
    found = {span.name: span for span in spans}
    if not found.keys() >= SPANS:
        return None
    push, load, first = found["kv.push"], found["kv.load"], found["decode.first_token"]
    return {
        "bytes": push.attributes["bytes"],
        "hand-off": (load.end_ns - push.start_ns) / 1e6,
        "copy out": (push.end_ns - push.start_ns) / 1e6,
        "notice": (load.start_ns - push.end_ns) / 1e6,
        "copy in": (load.end_ns - load.start_ns) / 1e6,
        "first token": (first.end_ns - push.start_ns) / 1e6,
    }
