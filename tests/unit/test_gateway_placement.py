"""Placement: tables, and what must hold for any fleet."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.scheduling.placement import (
    AHEAD_S,
    AT_FIRST,
    END_S,
    Candidate,
    Pools,
    Rules,
    Wish,
    other_prefiller,
    place,
)

NOW = 100.0


def candidate(id: str, *takes: str, **values) -> Candidate:  # noqa: A002
    return Candidate(id=id, takes=frozenset(takes), **values)


P, D = candidate("p", "prefill"), candidate("d", "decode")
FAST = {"token_s": 0.001, "begins_at": NOW}


def later(seconds: float) -> dict[str, float]:
    """Of one that has so much to compute."""
    return {"tokens_until": NOW + seconds, "begins_at": NOW + seconds}


BUSY = {"load": 0.5, "step_s": 0.02}


def choose(
    candidates, *, tokens=1000, output=0, whole="", hits=None, arrangement="split", avoid=(), itl_s=0.1, seed=0, **rules
):
    return place(
        Pools(candidates),
        Wish(tokens=tokens, output=output, whole=whole, hits=hits or {}),
        Rules(arrangement=arrangement, itl_s=itl_s, **rules),
        avoid=avoid,
        random=Random(seed),
        now=NOW,
    )


@pytest.mark.parametrize(
    ("candidates", "wish", "expected"),
    [
        ([P, D], {}, ("p", "d", "split")),
        ([P, D], {"tokens": 1}, ("p", "d", "split")),
        ([P, D], {"arrangement": "unsplit"}, (None, "d", "unsplit")),
        # Before speeds are known the prompt's length decides.
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
        (
            [
                candidate("p", "prefill", fingerprint="1", **FAST),
                candidate("q", "prefill", fingerprint="2", token_s=0.009),
                candidate("d", "decode", fingerprint="2"),
            ],
            {},
            ("q", "d", "split"),
        ),
        # A worker without room is waited for, not worked around.
        ([candidate("p", "prefill", has_room=False), D], {}, None),
        ([P, candidate("d", "decode", has_room=False)], {}, None),
        ([P, candidate("d", "decode", has_room=False), candidate("e", "decode")], {}, ("p", "e", "split")),
        ([P, D], {"avoid": {"d"}}, None),
        ([P, candidate("q", "prefill"), D], {"avoid": {"p"}}, ("q", "d", "split")),
        # The soonest: work ahead and its own.
        (
            [
                candidate("slow", "prefill", token_s=0.01, begins_at=NOW),
                candidate("fast", "prefill", token_s=0.001, begins_at=NOW + 0.01),
                D,
            ],
            {},
            ("fast", "d", "split"),
        ),
        # Bound late: one whose tokens take longer than a step by itself is not given more.
        ([candidate("p", "prefill", **FAST | later(2 * AHEAD_S)), D], {}, None),
        ([candidate("p", "prefill", **FAST | later(2 * AHEAD_S), prompt_s=2 * AHEAD_S), D], {}, ("p", "d", "split")),
        ([candidate("p", "prefill", **FAST | later(AHEAD_S / 2)), D], {}, ("p", "d", "split")),
        # Without a head start: when it should be done with all that it has, what steps cost included; and the rest of a group.
        ([candidate("p", "prefill", **FAST | later(2 * END_S), done_at=NOW + 2 * END_S), D], {"crowded": True}, None),
        (
            [candidate("p", "prefill", **FAST | later(2 * END_S), done_at=NOW + END_S / 2), D],
            {"crowded": True},
            ("p", "d", "split"),
        ),
        (
            [candidate("p", "prefill", **FAST | later(0.01), prompt_s=0.02, bound_at=NOW, done_at=NOW + 0.03), D],
            {"crowded": True},
            ("p", "d", "split"),
        ),
        (
            [candidate("p", "prefill", **FAST | later(0.03), prompt_s=0.02, bound_at=NOW, done_at=NOW + 0.05), D],
            {"crowded": True},
            None,
        ),
        # Before its speed is known a worker gets a few, or a burst would be bound before anything is.
        ([candidate("p", "prefill", prompts=AT_FIRST), D], {}, None),
        ([candidate("p", "prefill", prompts=AT_FIRST - 1), D], {}, ("p", "d", "split")),
        ([candidate("p", "prefill", prompts=AT_FIRST, **FAST), D], {}, ("p", "d", "split")),
        # A node that holds the prefix has less to compute.
        (
            [candidate("p", "prefill", node="a", **FAST), candidate("q", "prefill", node="b", **FAST), D],
            {"hits": {"b": 900}},
            ("q", "d", "split"),
        ),
        # Decode: the soonest to have a sequence, then the least loaded; within the gap's target; with memory.
        (
            [P, candidate("d", "decode", sequence_s=1.0), candidate("e", "decode", load=0.9, step_s=0.01)],
            {},
            ("p", "e", "split"),
        ),
        ([P, candidate("d", "decode", load=0.5), candidate("e", "decode", load=0.1)], {}, ("p", "e", "split")),
        # What a hand-off took when it was measured is no reason to give another worker everything.
        (
            [P, candidate("d", "decode", load=0.5, load_s=0.001), candidate("e", "decode", load=0.1, load_s=0.5)],
            {},
            ("p", "e", "split"),
        ),
        ([P, candidate("d", "decode", load=0.5, step_s=0.2)], {}, None),
        ([P, candidate("d", "decode", load=0.5, step_s=0.2)], {"itl_s": 0.2}, ("p", "d", "split")),
        ([P, candidate("d", "decode", **BUSY, kv_free=1199)], {"output": 200}, None),
        ([P, candidate("d", "decode", **BUSY, kv_free=1200)], {"output": 200}, ("p", "d", "split")),
        ([P, candidate("d", "decode", kv_free=10)], {"output": 200}, ("p", "d", "split")),  # nothing else runs there
        # auto: whole where that is sooner and holds nobody up.
        (
            [candidate("p", "prefill", **FAST), candidate("d", "decode", load_s=0.01, **FAST)],
            {"arrangement": "auto"},
            (None, "d", "sooner"),
        ),
        (
            [candidate("p", "prefill", **FAST), candidate("d", "decode", load_s=0.01, **FAST, **BUSY)],
            {"arrangement": "auto"},
            ("p", "d", "auto"),
        ),
        (
            [candidate("p", "prefill", **FAST), candidate("d", "decode", load_s=0.01, **FAST, **BUSY)],
            {"arrangement": "auto", "tokens": 80},
            (None, "d", "sooner"),
        ),
        (
            [candidate("p", "prefill", **FAST), candidate("d", "decode", load_s=0.01, token_s=0.01)],
            {"arrangement": "auto"},
            ("p", "d", "auto"),
        ),
        # By load alone.
        (
            [
                candidate("slow", "prefill", token_s=0.1, **later(9), load=0.1),
                candidate("fast", "prefill", **FAST, load=0.2),
                D,
            ],
            {"strategy": "least_loaded"},
            ("slow", "d", "split"),
        ),
    ],
)
def test_table(candidates, wish, expected):
    placed = choose(candidates, **wish)
    assert (placed and (placed.prefill, placed.decode, placed.reason)) == expected


def test_prediction():
    prefill = candidate("p", "prefill", token_s=0.001, prompt_s=0.2, begins_at=NOW + 0.01)
    decode = candidate("d", "decode", load_s=0.01, load_token_s=0.0001, step_s=0.02, load=0.1)
    assert choose([prefill, decode], tokens=500).predicted_ttft_s == pytest.approx(0.01 + 0.2 + 0.5 + 0.01 + 0.05)
    # A sequence becomes free while the prompt is computed.
    later = candidate("d", "decode", sequence_s=2.0, load_s=0.01)
    assert choose([prefill, later], tokens=500).predicted_ttft_s == pytest.approx(2.01)
    assert choose([P, D]).predicted_ttft_s is None


def test_near_ties_are_spread():
    alike = [candidate(f"p{number}", "prefill", **FAST) for number in range(20)]
    chosen = {choose([*alike, D], seed=seed).prefill for seed in range(100)}
    assert len(chosen) > 10


def test_many_full_workers_hide_nobody():
    full = [candidate(f"f{number}", "prefill", token_s=0.001, **later(1)) for number in range(500)]
    for seed in range(20):
        assert choose([*full, P, D], seed=seed).prefill == "p"


def test_a_pool_forgets_whom_it_loses():
    pools = Pools([P, candidate("q", "prefill"), D])
    pools.remove("p")
    pools.put(candidate("q", "prefill", has_room=False))
    assert pools.with_room("prefill") == []
    assert pools.can_split
    pools.remove("q")
    pools.remove("nobody")
    assert not pools.can_split
    assert [one.id for one in pools] == ["d"]


def test_another_prefiller_of_the_same_shape():
    pools = Pools(
        [
            candidate("p", "prefill", fingerprint="1", **FAST),
            candidate("q", "prefill", fingerprint="2", token_s=0.001, **later(9)),
            candidate("d", "decode", fingerprint="2"),
        ]
    )
    assert other_prefiller(pools, "d", avoid={"d"}, random=Random(0), now=NOW) == "q"
    assert other_prefiller(pools, "d", avoid={"d", "q"}, random=Random(0), now=NOW) is None


seconds = st.sampled_from([0.0, 0.01, 1.0])
workers = st.builds(
    Candidate,
    id=st.uuids().map(str),
    takes=st.sets(st.sampled_from(["prefill", "decode"])).map(frozenset),
    fingerprint=st.sampled_from(["", "a", "b"]),
    has_room=st.booleans(),
    load=st.sampled_from([0.0, 0.5]),
    begins_at=st.sampled_from([0.0, NOW, NOW + 1]),
    token_s=st.sampled_from([0.0, 0.01]),
    sequence_s=seconds,
    step_s=seconds,
    kv_free=st.sampled_from([10.0, 10_000.0]),
)


@given(
    st.lists(workers, max_size=8),
    st.sampled_from(["split", "unsplit", "auto"]),
    st.sampled_from(["predicted", "least_loaded"]),
    st.booleans(),
    st.integers(1, 999),
)
def test_whoever_is_chosen_can_do_it(candidates, arrangement, strategy, whole, tokens):
    placed = choose(
        candidates, tokens=tokens, whole="asked" if whole else "", arrangement=arrangement, strategy=strategy
    )
    by_id = {one.id: one for one in candidates}
    if placed is None:
        return
    decode = by_id[placed.decode]
    assert "decode" in decode.takes
    assert decode.has_room
    if strategy == "predicted":
        assert decode.load == 0 or (decode.step_s <= 0.1 and tokens <= decode.kv_free)
    if placed.prefill is not None:
        prefill = by_id[placed.prefill]
        assert "prefill" in prefill.takes
        assert prefill.has_room
        assert prefill is not decode
        assert prefill.fingerprint == decode.fingerprint or not (prefill.fingerprint and decode.fingerprint)
        assert arrangement != "unsplit"
        assert not whole


def on(node: str, id: str, *takes: str, **values) -> Candidate:  # noqa: A002
    return candidate(id, *takes, node=node, **values)


@pytest.mark.parametrize(
    ("link_token_s", "hits", "way_s"),
    [
        (0.0, {}, 0.0),
        (0.0001, {}, 0.025),  # computing takes 1 s, sending 0.1 s: the last chunk is left
        (0.002, {}, 1.0),  # sending takes 2 s
        (0.002, {"b": 1000}, 0.0),  # is there already
    ],
)
def test_a_pair_on_two_nodes_pays_for_the_way(link_token_s: float, hits: dict[str, int], way_s: float) -> None:
    def predicted(decode_node: str) -> float:
        pools = Pools([on("a", "p", "prefill", **FAST), on(decode_node, "d", "decode")])
        pools.link_token_s = link_token_s
        found = place(
            pools, Wish(tokens=1000, hits=hits), Rules(arrangement="split"), avoid=(), random=Random(0), now=NOW
        )
        assert found is not None
        assert found.predicted_ttft_s is not None
        return found.predicted_ttft_s

    assert predicted("b") - predicted("a") == pytest.approx(way_s)


def test_the_decode_worker_of_prefills_own_node_is_nearer() -> None:
    workers = [on("a", "p", "prefill", **FAST), *(on(node, f"d-{node}", "decode", load=0.1) for node in "abc")]
    for link_token_s, chosen in ((0.002, {"d-a"}), (0.0, {"d-a", "d-b", "d-c"})):
        pools = Pools(workers)
        pools.link_token_s = link_token_s
        found = {
            place(pools, Wish(tokens=1000), Rules(arrangement="split"), avoid=(), random=Random(seed), now=NOW).decode
            for seed in range(30)
        }
        assert found == chosen
