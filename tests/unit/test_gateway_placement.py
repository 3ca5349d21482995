"""Placement and admission: tables, and what must hold for any fleet."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.admission import Snapshot, admit, fit, retry_after_s
from services.gateway.placement import Candidate, Wish, place
from shared.errors import ContextLengthExceeded, Draining, NoCapacity, QueueFull


def candidate(id: str, *takes: str, **values) -> Candidate:  # noqa: A002
    return Candidate(id=id, takes=frozenset(takes), **values)


P, D = candidate("p", "prefill"), candidate("d", "decode")
FULL = {"max_running": 2, "max_waiting": 1, "jobs": 3}


def choose(candidates, *, tokens=1000, whole="", arrangement="split", avoid=()):
    return place(
        candidates,
        Wish(tokens=tokens, whole=whole),
        arrangement=arrangement,
        local_prefill_tokens=256,
        avoid=avoid,
        random=Random(0),
    )


@pytest.mark.parametrize(
    ("candidates", "wish", "expected"),
    [
        ([P, D], {}, ("p", "d", "split")),
        ([P, D], {"tokens": 1}, ("p", "d", "split")),
        ([P, D], {"arrangement": "unsplit"}, (None, "d", "unsplit")),
        ([P, D], {"arrangement": "auto"}, ("p", "d", "auto")),
        ([P, D], {"arrangement": "auto", "tokens": 255}, (None, "d", "short_prompt")),
        ([P, D], {"arrangement": "auto", "tokens": 256}, ("p", "d", "auto")),
        ([D], {}, (None, "d", "no_prefill_worker")),
        ([P, D], {"whole": "prefill_failed"}, (None, "d", "prefill_failed")),
        ([P, D], {"whole": "prompt_logprobs", "arrangement": "auto"}, (None, "d", "prompt_logprobs")),
        ([P], {}, None),
        ([], {}, None),
        # One that takes both does not hand over to itself.
        ([candidate("b", "prefill", "decode")], {}, (None, "b", "no_prefill_worker")),
        ([candidate("b", "prefill", "decode"), D], {}, ("b", "d", "split")),
        # KV of another shape cannot be loaded.
        (
            [candidate("p", "prefill", fingerprint="1"), candidate("d", "decode", fingerprint="2")],
            {},
            (None, "d", "no_prefill_worker"),
        ),
        # A worker without room is waited for, not worked around.
        ([candidate("p", "prefill", **FULL), D], {}, None),
        ([P, candidate("d", "decode", **FULL)], {}, None),
        ([P, candidate("d", "decode", **FULL), candidate("e", "decode")], {}, ("p", "e", "split")),
        ([P, D], {"avoid": {"d"}}, None),
        ([P, candidate("q", "prefill"), D], {"avoid": {"p"}}, ("q", "d", "split")),
        # Load: seconds of prefill, share of decode's sequences.
        (
            [
                candidate("slow", "prefill", queued_tokens=500, prefill_tokens_per_s=100),
                candidate("fast", "prefill", queued_tokens=1000, prefill_tokens_per_s=1000),
                D,
            ],
            {},
            ("fast", "d", "split"),
        ),
        (
            [
                candidate("small", "decode", jobs=2, max_running=4),
                candidate("large", "decode", jobs=4, max_running=64),
            ],
            {},
            (None, "large", "no_prefill_worker"),
        ),
    ],
)
def test_table(candidates, wish, expected):
    placed = choose(candidates, **wish)
    assert (placed and (placed.prefill, placed.decode, placed.reason)) == expected


def test_prediction():
    workers = [candidate("p", "prefill", queued_tokens=500, prefill_tokens_per_s=1000), D]
    assert choose(workers, tokens=500).predicted_ttft_s == pytest.approx(1.0)
    assert choose([P, D]).predicted_ttft_s is None


workers = st.builds(
    Candidate,
    id=st.uuids().map(str),
    takes=st.sets(st.sampled_from(["prefill", "decode"])).map(frozenset),
    fingerprint=st.sampled_from(["", "a", "b"]),
    jobs=st.integers(0, 5),
    max_running=st.integers(0, 3),
    max_waiting=st.integers(0, 1),
    prefill_tokens_per_s=st.sampled_from([0.0, 100.0]),
)


@given(st.lists(workers, max_size=6), st.sampled_from(["split", "unsplit", "auto"]), st.booleans(), st.integers(1, 999))
def test_whoever_is_chosen_can_do_it(candidates, arrangement, whole, tokens):
    placed = choose(candidates, tokens=tokens, whole=whole, arrangement=arrangement)
    by_id = {one.id: one for one in candidates}
    if placed is None:
        return
    decode = by_id[placed.decode]
    assert "decode" in decode.takes
    assert decode.has_room
    if placed.prefill is not None:
        prefill = by_id[placed.prefill]
        assert "prefill" in prefill.takes
        assert prefill.has_room
        assert prefill is not decode
        assert prefill.fingerprint == decode.fingerprint or not (prefill.fingerprint and decode.fingerprint)
        assert arrangement != "unsplit"
        assert not whole


OPEN = {
    "draining": False,
    "connected": True,
    "decode_alive": True,
    "requests": 0,
    "max_requests": 10,
    "queued": 0,
    "served_per_s": 0.0,
}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"draining": True}, Draining),
        ({"connected": False}, NoCapacity),
        ({"decode_alive": False}, NoCapacity),
        ({"requests": 10}, QueueFull),
    ],
)
def test_refusals_say_when_to_come_back(change, error):
    with pytest.raises(error) as refused:
        admit(Snapshot(**OPEN | change))
    assert refused.value.retry_after_s > 0


def test_admitted():
    admit(Snapshot(**OPEN))


@given(st.integers(0, 10**6), st.floats(0, 10**6))
def test_retry_after_is_bounded(queued, rate):
    assert 1.0 <= retry_after_s(Snapshot(**OPEN | {"queued": queued, "served_per_s": rate})) <= 60.0


@pytest.mark.parametrize(
    ("prompt", "asked", "context", "outcome"),
    [
        (10, None, 100, 90),
        (10, 90, 100, 90),
        (10, 91, 100, "max_tokens"),
        (100, None, 100, "prompt"),
        (100, 1, 100, "prompt"),
        (99, None, 100, 1),
        (10**6, 7, 0, 7),
    ],
)
def test_fit(prompt, asked, context, outcome):
    def ask() -> int:
        return fit(prompt, asked, context, prompt_param="prompt", limit_param="max_tokens")

    if isinstance(outcome, int):
        assert ask() == outcome
    else:
        with pytest.raises(ContextLengthExceeded) as refused:
            ask()
        assert refused.value.param == outcome
