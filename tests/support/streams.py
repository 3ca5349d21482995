"""Streams that are read while something happens to the cluster, and what came of them."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import openai

from tests.support.exact import MODEL, arguments

BEGUN = 5  # tokens


@dataclass
class Asked:
    name: str
    prompt: str
    params: dict[str, Any]
    schema: dict[str, Any] | None = None  # a chat, because only chats have response formats

    def arguments(self) -> dict[str, Any]:
        more = {"stream": True, "stream_options": {"include_usage": True}}
        if self.schema is None:
            return {**arguments(self.prompt, self.params), **more}
        shape = {"type": "json_schema", "json_schema": {"name": "thing", "schema": self.schema}}
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": self.prompt}],
            "response_format": shape,
            "extra_body": {"return_token_ids": True},
            **self.params,
            **more,
        }


@dataclass
class Said:
    """One choice, as far as it has come."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    scores: list[tuple[str, float]] = field(default_factory=list)  # tokens and their log probabilities
    ends: list[str] = field(default_factory=list)  # finish reasons


class Reading:
    """One stream, read to its end by `read`."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.choices: dict[int, Said] = {}
        self.completion_tokens = 0
        self.longest_gap_s = 0.0
        self.begun = asyncio.Event()  # or over

    @property
    def outcome(self) -> tuple[dict[int, Said], int]:
        return self.choices, self.completion_tokens

    @property
    def ended(self) -> bool:
        return bool(self.completion_tokens)

    async def read(self, client: openai.AsyncOpenAI) -> None:
        """Raises openai.APIError for an error event."""
        try:
            async with asyncio.timeout(300):
                await self._read(client)
        finally:
            self.begun.set()

    async def _read(self, client: openai.AsyncOpenAI) -> None:
        create = client.completions.create if self.asked.schema is None else client.chat.completions.create
        last = None
        async for chunk in await create(**self.asked.arguments()):
            now = time.monotonic()
            self.longest_gap_s = max(self.longest_gap_s, now - last if last else 0.0)
            last = now
            if chunk.usage is not None:
                self.completion_tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                self._take(choice)
            if sum(len(said.ids) for said in self.choices.values()) > BEGUN:
                self.begun.set()

    def _take(self, choice: Any) -> None:
        said = self.choices.setdefault(choice.index, Said())
        said.text += (choice.text if self.asked.schema is None else choice.delta.content) or ""
        said.ids += (choice.model_extra or {}).get("token_ids") or []
        if choice.logprobs is not None:
            # A decoded block may be computed a little otherwise than a prompt's: ten digits would be too many.
            said.scores += [
                (token, round(score, 3))
                for token, score in zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)
            ]
        if choice.finish_reason is not None:
            said.ends.append(choice.finish_reason)


async def read_all(client: openai.AsyncOpenAI, asked: list[Asked]) -> list[Reading]:
    """Undisturbed."""
    readings = [Reading(one) for one in asked]
    await asyncio.gather(*(reading.read(client) for reading in readings))
    return readings
