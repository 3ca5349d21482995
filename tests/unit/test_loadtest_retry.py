"""Retries, against the official client's own functions."""

import httpx2
import openai
import pytest

from loadtest.load import retry
from loadtest.load.answer import Outcome

NOW_S = 1_700_000_000.0
OFFICIAL = openai.OpenAI(api_key="none", base_url="http://127.0.0.1:9", max_retries=5)
HEADERS = [
    {},
    {"retry-after": "3"},
    {"retry-after": "0"},
    {"retry-after": "-4"},
    {"retry-after": "0.25"},
    {"retry-after": "120"},
    {"retry-after": "121"},
    {"retry-after": "soon"},
    {"retry-after": "nan"},
    {"retry-after": "inf"},
    {"retry-after": "1e400"},
    {"retry-after-ms": "1500"},
    {"retry-after-ms": "1500", "retry-after": "9"},
    {"retry-after-ms": "x", "retry-after": "9"},
    {"retry-after-ms": "200000"},
    {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"},
    {"x-should-retry": "true"},
    {"x-should-retry": "false"},
    {"x-should-retry": "maybe"},
    {"x-should-retry": "true", "retry-after": "500"},
]
STATUSES = [400, 401, 404, 408, 409, 413, 422, 429, 500, 501, 503, 529]


def as_bytes(headers: dict[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode() for name, value in headers.items()}


@pytest.mark.parametrize("headers", HEADERS, ids=str)
@pytest.mark.parametrize("status", STATUSES)
def test_the_same_answers_are_retried(status, headers):
    official = OFFICIAL._should_retry(httpx2.Response(status, headers=headers))
    assert retry.retryable(Outcome.ERROR, status, as_bytes(headers), NOW_S) is official


@pytest.mark.parametrize("headers", HEADERS, ids=str)
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4])
def test_the_same_waits(taken, headers):
    """Its jitter is random: the wait without jitter and the longest one frame what it says."""
    options = openai._models.FinalRequestOptions(method="post", url="/", max_retries=5)
    least, most = (retry.delay_s(taken, as_bytes(headers), NOW_S, draw) for draw in (1.0, 0.0))
    for _ in range(20):
        official = OFFICIAL._calculate_retry_timeout(5 - taken, options, httpx2.Headers(headers))
        assert least - 1e-9 <= official <= most + 1e-9


def test_constants_are_the_installed_ones():
    constants = openai._constants
    assert constants.INITIAL_RETRY_DELAY == retry.FIRST_DELAY_S
    assert constants.MAX_RETRY_DELAY == retry.MAX_DELAY_S
    assert constants.MAX_RETRY_AFTER_DELAY == retry.MAX_RETRY_AFTER_S


@pytest.mark.parametrize(
    ("taken", "draw", "expected"),
    [
        (0, 0.0, 0.5),
        (1, 0.0, 1.0),
        (2, 0.0, 2.0),
        (3, 0.0, 4.0),
        (4, 0.0, 8.0),
        (9, 0.0, 8.0),
        (5000, 0.0, 8.0),
        (0, 1.0, 0.375),
    ],
)
def test_backoff(taken, draw, expected):
    assert retry.delay_s(taken, {}, NOW_S, draw) == expected


def test_a_date_counts_from_now():
    headers = {b"retry-after": b"Tue, 14 Nov 2023 22:13:50 GMT"}  # 30 s later
    assert retry.delay_s(0, headers, NOW_S, 0.0) == 30.0


@pytest.mark.parametrize(
    ("outcome", "status", "expected"),
    [
        (Outcome.UNREACHABLE, None, True),
        (Outcome.TIMEOUT, None, True),
        (Outcome.CUT, 200, False),  # a stream that has begun
        (Outcome.TIMEOUT, 200, False),
        (Outcome.ERROR, 200, False),
        (Outcome.LEFT, None, False),
        (Outcome.OK, 200, False),
    ],
)
def test_without_an_answer(outcome, status, expected):
    assert retry.retryable(outcome, status, {}, NOW_S) is expected
