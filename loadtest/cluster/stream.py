"""One streamed completion, timed as a client sees it."""

import random
import time
from dataclasses import dataclass, field

import httpx
import msgspec

from loadtest import slo


@dataclass
class Timing:
    """Seconds. Gaps are between events that carry text; events that arrive in one read have a gap of almost 0."""

    ttft_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    tokens: int = 0
    trace_id: str = ""


def random_prompt(tokens: int, rng: random.Random) -> list[int]:
    """Token ids that no cache has seen; ids below 200 exist in any vocabulary."""
    return [rng.randrange(10, 200) for _ in range(tokens)]


async def complete(
    client: httpx.AsyncClient, model: str, prompt: list[int], output_tokens: int, headers: dict[str, str] | None = None
) -> Timing:
    """Raises httpx.HTTPError or RuntimeError when the answer is not a whole stream."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    timing, started = Timing(), time.perf_counter()
    last = 0.0
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread())[:300]!r}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            event = msgspec.json.decode(line[6:])
            if error := event.get("error"):
                raise RuntimeError(f"error event: {error}")
            if usage := event.get("usage"):
                timing.tokens = usage["completion_tokens"]
            if event["choices"]:
                if last:
                    timing.gaps_s.append(now - last)
                else:
                    timing.ttft_s = now - started
                last = now
    timing.total_s = time.perf_counter() - started
    if timing.tokens != output_tokens:
        raise RuntimeError(f"{timing.tokens} tokens instead of {output_tokens}")
    return timing


def percentile(values: list[float], share: float) -> float:
    """Nearest rank; 0 for nothing, which a table can print."""
    return slo.percentile(values, share) or 0.0
