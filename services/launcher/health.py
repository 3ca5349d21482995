"""Whether a process answers, by its own probe."""

import asyncio
from collections.abc import Callable

import httpx

PROBE_S = 2.0
RETRY_S = 0.2
LOOK_S = 3.0
DEAF_LOOKS = 6  # with PROBE_S for each, half a minute


def probe_client() -> httpx.AsyncClient:
    # No proxy from the environment: probes never leave this machine.
    return httpx.AsyncClient(timeout=PROBE_S, trust_env=False)


async def why_not_ready(client: httpx.AsyncClient, url: str) -> str | None:
    """None when `/ready` answers 200, else what it says; "no answer" when nobody does."""
    try:
        answer = await client.get(f"{url}/ready")
    except httpx.HTTPError:
        return NO_ANSWER
    if answer.status_code == httpx.codes.OK:
        return None
    try:
        reason = answer.json()["reason"]
    except (ValueError, KeyError, TypeError):
        reason = ""
    return str(reason or f"not ready (HTTP {answer.status_code})")


async def until_ready(client: httpx.AsyncClient, url: str, said: Callable[[str], None]) -> None:
    """Wait; `said` is told each reason, or "" while there is no answer."""
    while (reason := await why_not_ready(client, url)) is not None:
        said("" if reason == NO_ANSWER else reason)
        await asyncio.sleep(RETRY_S)  # a probe can only be asked again


async def until_deaf(client: httpx.AsyncClient, url: str, *, look_s: float = LOOK_S, looks: int = DEAF_LOOKS) -> None:
    """Wait until so many looks in a row got no answer at all; "not ready" is an answer.

    Looks are counted, not seconds: time in which this process itself stood still says nothing about others.
    """
    unanswered = 0
    while unanswered < looks:
        await asyncio.sleep(look_s)
        unanswered = unanswered + 1 if await why_not_ready(client, url) == NO_ANSWER else 0


NO_ANSWER = "no answer"
