"""Mixed load for a long time: right texts, flat memory, nothing held at the end.

Answers are computed first, one at a time. Then clients send those prompts at random, streamed or whole, some leaving
early; each answer is compared. The memory of every process of a cluster on this machine is sampled once a minute.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

PROMPTS = 40
SAMPLE_S = 60.0
LEAVING = 0.15  # share of clients that leave early


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=8000, help="of a cluster started by `baton up` on this machine")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--max-prompt-tokens", type=int, default=1500)
    parser.add_argument("--max-output-tokens", type=int, default=120)
    parser.add_argument("--out", type=Path, help="write the result as JSON")


def run(args: argparse.Namespace) -> int:
    result = asyncio.run(_Soak(args).run())
    print(json.dumps({key: value for key, value in result.items() if key != "memory"}, indent=1))
    print(_memory_table(result["memory"]))
    if args.out:
        args.out.write_text(json.dumps(result))
    return 0 if not result["wrong"] and not result["errors"] else 1


class _Soak:
    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._rng = random.Random(5)
        self._outcomes: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._memory: list[dict[str, float]] = []
        self._model = ""
        self._known: list[tuple[dict[str, Any], str]] = []

    async def run(self) -> dict[str, Any]:
        args = self._args
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{args.port}", timeout=300) as client:
            self._model = (await client.get("/v1/models")).json()["data"][0]["id"]
            for _ in range(PROMPTS):
                body = self._body()
                self._known.append((body, await self._whole(client, body)))
            print(f"{PROMPTS} answers known; {args.minutes:g} minutes of load begin", flush=True)
            end = time.monotonic() + 60 * args.minutes
            async with asyncio.TaskGroup() as tasks:
                for _ in range(args.concurrency):
                    tasks.create_task(self._load(client, end))
                tasks.create_task(self._watch(end))
        return {
            "minutes": args.minutes,
            "concurrency": args.concurrency,
            "outcomes": dict(self._outcomes),
            "wrong": self._outcomes["wrong"],
            "errors": dict(self._errors),
            "memory": self._memory,
        }

    def _body(self) -> dict[str, Any]:
        rng, args = self._rng, self._args
        return {
            "model": self._model,
            "prompt": [rng.randrange(10, 120) for _ in range(rng.randrange(1, args.max_prompt_tokens))],
            "max_tokens": rng.randrange(1, args.max_output_tokens),
            "temperature": 0.0,
            "ignore_eos": True,
        }

    async def _load(self, client: httpx.AsyncClient, end: float) -> None:
        while time.monotonic() < end:
            body, expected = self._rng.choice(self._known)
            leaving = self._rng.random() < LEAVING
            read = self._streamed if self._rng.random() < 0.7 else self._whole
            try:
                async with asyncio.timeout(0.5 * self._rng.random() if leaving else 120):
                    text = await read(client, body)
            except TimeoutError:
                self._outcomes["left" if leaving else "hung"] += 1
            except (httpx.HTTPError, RuntimeError) as error:
                self._outcomes["error"] += 1
                self._errors[str(error)[:120] or type(error).__name__] += 1
            else:
                self._outcomes["right" if text == expected else "wrong"] += 1

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        answer = await client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text[:100]}")
        return str(answer.json()["choices"][0]["text"])

    async def _streamed(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        pieces = []
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {(await answer.aread())[:100]!r}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = msgspec.json.decode(line[6:])
                    if error := event.get("error"):
                        raise RuntimeError(f"event: {error}")
                    pieces += [choice["text"] for choice in event["choices"]]
        return "".join(pieces)

    async def _watch(self, end: float) -> None:
        while True:
            self._memory.append(await asyncio.to_thread(memory, self._args.port))
            minute = len(self._memory) - 1
            print(f"minute {minute}: {dict(self._outcomes)}", flush=True)
            if time.monotonic() >= end:
                return
            await asyncio.sleep(min(SAMPLE_S, max(0.0, end - time.monotonic())))


def memory(port: int) -> dict[str, float]:
    """Service -> resident MiB without shared memory, its children included."""
    done = subprocess.run(
        [sys.executable, "-m", "services.launcher", "status", "--json", "--port", str(port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    found = {}
    for service in json.loads(done.stdout)["services"]:
        family = psutil.Process(service["pid"])
        parts = [process.memory_info() for process in (family, *family.children(recursive=True))]
        found[service["id"]] = sum(part.rss - part.shared for part in parts) / 2**20
    return found


def _memory_table(samples: list[dict[str, float]]) -> str:
    """Start, a quarter, half, three quarters, end."""
    if not samples:
        return ""
    marks = [round(share * (len(samples) - 1)) for share in (0, 0.25, 0.5, 0.75, 1)]
    lines = ["MiB at minute " + "".join(f"{mark:>9}" for mark in marks)]
    lines += [f"{name:14}" + "".join(f"{samples[mark].get(name, 0):9.1f}" for mark in marks) for name in samples[-1]]
    return "\n".join(lines)
