"""Clients that ask one request after another, whatever happens to the cluster, and check every text against the oracle."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from shared.worker.sim.oracle import Oracle

COMPLETE_S = 90
RETRY_S = 0.2


@dataclass
class Offered:
    """What came of it."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)  # a text that is not the oracle's: never allowed
    failed: list[str] = field(default_factory=list)  # clear errors, and connections that ended
    workers: set[str] = field(default_factory=set)  # whoever a receipt named
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def see(self, right: int) -> None:
        """Until so many more have come out right."""
        goal = self.right + right
        async with asyncio.timeout(COMPLETE_S):
            while self.right < goal:
                await self._news.wait()

    async def see_workers(self, workers: list[str]) -> None:
        """Until each of these has served a request."""
        async with asyncio.timeout(COMPLETE_S):
            while not self.workers.issuperset(workers):
                await self._news.wait()


@dataclass
class Question:
    prompt: list[int]
    output: int

    @classmethod
    def some(cls, rng: random.Random) -> "Question":
        return cls([rng.randrange(8, 1500) for _ in range(rng.randrange(40, 600))], rng.randrange(10, 60))


@asynccontextmanager
async def offered(client: httpx.AsyncClient, oracle: Oracle, clients: int, seed: int = 0) -> AsyncIterator[Offered]:
    """Within, `clients` ask streams without a pause; at the end each of them finishes the one it is in."""
    seen, stop = Offered(), asyncio.Event()

    async def ask_on(rng: random.Random) -> None:
        while not stop.is_set():
            failed = len(seen.failed)
            await ask(client, Question.some(rng), oracle, seen)
            if len(seen.failed) > failed:
                await asyncio.sleep(RETRY_S)  # as clients do

    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(ask_on(random.Random(f"{seed}-{number}")))
        try:
            yield seen
        finally:
            stop.set()


async def ask(client: httpx.AsyncClient, question: Question, oracle: Oracle, seen: Offered) -> None:
    body = {
        "model": "baton-demo",
        "prompt": question.prompt,
        "max_tokens": question.output,
        "temperature": 0,
        "stream": True,
    }
    try:
        async with client.stream("POST", "/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                problem = json.loads(await answer.aread())["error"]
                seen.failed.append(f"{answer.status_code} {problem['code']}")
            else:
                await _read(answer, question, oracle, seen)
    except httpx.HTTPError as error:
        seen.failed.append(type(error).__name__)
    seen.note()


async def _read(answer: httpx.Response, question: Question, oracle: Oracle, seen: Offered) -> None:
    text, done = "", False
    async for line in answer.aiter_lines():
        if line.startswith(": baton-receipt "):
            _note_receipt(json.loads(line.removeprefix(": baton-receipt ")), seen)
        elif line == "data: [DONE]":
            done = True
        elif line.startswith("data: "):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                seen.failed.append(f"in the stream: {chunk['error']['code']}")
                return
            text += "".join(choice["text"] for choice in chunk["choices"])
    if not done:
        seen.failed.append("the stream ended without an end")
    elif text == oracle.expected_text(question.prompt, question.output):
        seen.right += 1
    else:
        seen.wrong.append(f"prompt of {len(question.prompt)} tokens, {question.output} of output: {text!r}")


def _note_receipt(receipt: dict[str, Any], seen: Offered) -> None:
    seen.workers |= {receipt[role] for role in ("prefill", "decode") if receipt[role]}
