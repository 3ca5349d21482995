"""When a process counts as deaf: looks in a row without any answer."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from services.launcher.health import until_deaf


def answering(answers: list[bool]) -> tuple[httpx.AsyncClient, Callable[[], int]]:
    """A client whose peer answers (with 503) or not, in this order, and not after that; and how many are left."""

    def answer(_: httpx.Request) -> httpx.Response:
        if answers and answers.pop(0):
            return httpx.Response(503, json={"ready": False, "reason": "loading"})
        raise httpx.ReadTimeout("nobody")

    return httpx.AsyncClient(transport=httpx.MockTransport(answer)), lambda: len(answers)


@pytest.mark.parametrize(
    "answers", [[], [True], [False, False, True, False, True], [False, False, True] * 3], ids=["never", "1", "2", "3"]
)
async def test_only_looks_in_a_row_count(answers: list[bool]) -> None:
    client, left = answering(answers)
    async with client, asyncio.timeout(5):
        await until_deaf(client, "http://worker", look_s=0, looks=3)
    assert left() == 0
