"""`loadtest plan`: what requests would see on so many workers, worked out by hand; the smallest fleet that does."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.__main__ import main
from loadtest.load.conversation import Conversation, Turn
from loadtest.load.prompts import Segment
from loadtest.planning.demand import Demand, demands
from loadtest.planning.fleet import Engine, Fleet, Job, Served, serve
from loadtest.planning.search import Goal, smallest
from loadtest.slo import Slo
from shared.worker.sim.profile import Profile

# 100 ms for up to a budget of tokens; 10 ms to decode, however many.
PROFILE = Profile(
    name="plain",
    model="m",
    hardware="h",
    source="made",
    licence="none",
    kv_bytes_per_token=1000,
    max_model_len=10_000,
    max_running=4,
    token_budget=1000,
    prefill_ms=[(1000, 100.0)],
    decode_ms=[(100, 10.0)],
)
SLO = Slo(ttft_s=0.25, itl_s=0.05, itl_share=1.0)
LINK = 10_000_000.0  # 0.1 s for 1,000 tokens


def one(at_s: float, prompt: int = 1000, output: int = 3, cached: int = 0) -> Demand:
    return Demand(at_s, prompt, cached, output)


def served(load: list[Demand], **fleet: int) -> Served:
    return serve(load, PROFILE, Fleet(**fleet), SLO, LINK)


def test_a_split_request_takes_its_prompt_the_way_of_its_blocks_and_a_step():
    found = served([one(0.0)], prefill=1, decode=1)
    assert found.computed_s == pytest.approx([0.1])
    assert found.ttft_s == pytest.approx([0.1 + 0.1 + 0.01])
    assert found.good.all()
    assert found.prefill_busy == pytest.approx(0.1 / 0.23)
    assert found.decode_busy == pytest.approx(0.03 / 0.23)
    assert found.kv_tokens == 1003


def test_only_the_last_chunk_s_blocks_are_waited_for_and_what_is_cached_is_not_computed():
    assert served([one(0.0, prompt=3000)], prefill=1, decode=1).ttft_s == pytest.approx([0.3 + 0.1 + 0.01])
    assert served([one(0.0, prompt=3000, cached=2000)], prefill=1, decode=1).computed_s == pytest.approx([0.1])


def test_whoever_comes_second_waits_for_the_step_before():
    load = [one(0.0), one(0.05)]
    assert served(load, prefill=1, decode=1).computed_s == pytest.approx([0.1, 0.15])
    assert served(load, prefill=2, decode=1).computed_s == pytest.approx([0.1, 0.1])


def test_short_prompts_share_a_step():
    assert served([one(0.0)] + [one(0.01, prompt=300)] * 3, prefill=1, decode=1).computed_s == pytest.approx(
        [0.1, 0.19, 0.19, 0.19]
    )


def test_unsplit_another_one_s_prompt_is_a_gap_and_split_it_is_not():
    load = [one(0.0, output=30), one(0.2, prompt=900)]
    together = served(load, decode=1)
    assert together.ttft_s[0] == pytest.approx(0.1)  # sampled behind the prompt itself
    assert together.steady.tolist() == [False, True]
    apart = served(load, prefill=1, decode=1)
    assert apart.steady.tolist() == [True, True]
    assert served(load, decode=2).good.all()


def test_sequences_wait_for_a_place():
    load = [one(0.0, prompt=100, output=10)] * 5  # at decode all at once, after 0.11 s
    found = served(load, prefill=5, decode=1)
    assert found.ttft_s == pytest.approx([0.12, 0.13, 0.13, 0.13, 0.22])  # the first one's step had begun
    assert served(load, prefill=5, decode=2).ttft_s.max() == pytest.approx(0.13)


@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.integers(1, 4000), st.floats(0, 0.99), st.integers(1, 60)),
        min_size=1,
        max_size=30,
    ),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_whatever_comes_is_served_after_it_came(load, prefill, decode):
    some = sorted(
        (Demand(at_s, prompt, min(prompt - 1, int(share * prompt)), output) for at_s, prompt, share, output in load),
        key=lambda demand: demand.at_s,
    )
    found = served(some, prefill=prefill, decode=decode)
    assert (found.computed_s > 0).all()
    assert (found.ttft_s >= found.computed_s - 1e-9).all()
    assert 0 < found.decode_busy <= 1 + 1e-9
    assert 0 <= found.prefill_busy <= 1 + 1e-9


def test_an_engine_is_empty_when_its_sequences_have_gone():
    engine = Engine(PROFILE, slow_s=1.0, takes_line=False)
    engine.joining.extend(Job(one(0.0, output=output), 0) for output in (1, 2, 5))
    while (step := engine.begin()).seconds:
        engine.end(step, 0.0)
    assert (engine.context, engine.sequences, engine.steps) == (0, 0, 5)


# ---- requests ------------------------------------------------------------------------------------------------


class Source:
    name = "two turns"
    size = None
    arrivals_s = None

    def conversation(self, index: int) -> Conversation:
        turns = (
            Turn(say=(Segment(index, 100),), output_tokens=10),
            Turn(say=(Segment(index, 50),), output_tokens=20, think_s=3.0),
        )
        return Conversation(chat=False, turns=turns, system=Segment(7, 40))

    def described(self) -> dict[str, object]:
        return {}


def test_a_next_turn_has_what_was_said_before_and_comes_when_that_was_read():
    found = demands(Source(), [1.0, 2.0], room_tokens=1000, cached_share=0.5, pace_s=0.1)
    assert found == [
        Demand(1.0, 140, 70, 10),
        Demand(2.0, 140, 70, 10),
        Demand(5.0, 200, 100, 20),
        Demand(6.0, 200, 100, 20),
    ]


def test_what_the_model_has_no_room_for_is_cut_and_ends_the_conversation():
    found = demands(Source(), [0.0], room_tokens=100, cached_share=0.0, pace_s=0.1)
    assert [(demand.prompt_tokens, demand.output_tokens) for demand in found] == [(90, 10)]


# ---- the smallest fleet --------------------------------------------------------------------------------------


def outcome(*, late_by_prefill: bool, late_by_decode: bool) -> Served:
    late = late_by_prefill or late_by_decode
    return Served(
        ttft_s=np.array([1.0 if late else 0.1]),
        computed_s=np.array([0.9 if late_by_prefill else 0.05]),
        steady=np.array([True]),
        good=np.array([not late]),
        prefill_busy=0.5,
        decode_busy=0.5,
        kv_tokens=1,
    )


@pytest.mark.parametrize("needed", [(1, 1), (3, 1), (1, 7), (4, 9), (20, 2)])
def test_it_finds_what_is_needed_and_no_more(needed):
    def try_(fleet: Fleet) -> Served:
        short = fleet.prefill < needed[0]
        return outcome(late_by_prefill=short, late_by_decode=not short and fleet.decode < needed[1])

    found = smallest(try_, Goal(slo=SLO, good_share=0.9, max_workers=64), split=True)
    assert found is not None
    assert (found[0].prefill, found[0].decode) == needed


def test_unsplit_has_one_tier_and_no_fleet_is_an_answer_too():
    def try_(fleet: Fleet) -> Served:
        assert fleet.prefill == 0
        return outcome(late_by_prefill=False, late_by_decode=fleet.decode < 5)

    found = smallest(try_, Goal(slo=SLO, good_share=0.9, max_workers=5), split=False)
    assert found is not None
    assert found[0] == Fleet(decode=5)
    assert smallest(try_, Goal(slo=SLO, good_share=0.9, max_workers=4), split=False) is None


# ---- the command ---------------------------------------------------------------------------------------------


def plan(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["loadtest", "plan", *words])
    return main()


def test_the_command_says_how_many(monkeypatch, capsys):
    words = ("chat", "--profile", "llama2-70b-h100", "--rate", "20", "--seconds", "20", "--json")
    assert plan(monkeypatch, *words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["split"]["prefill"] >= 1 <= said["split"]["decode"]
    assert said["split"]["good"] >= 0.9 <= said["unsplit"]["good"]
    assert plan(monkeypatch, *words[:-1]) == 0
    assert "prefill +" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nothing", "--rate", "1"), "no such workload"),
        (("chat",), "give --rate R"),
        (("chat", "--rate", "0"), "--rate: must be more than 0"),
        (("chat", "--rate", "20", "--good", "2"), "--good"),
        (("chat", "--rate", "20", "--cached-share", "1"), "--cached-share"),
        (("chat", "--rate", "20", "--slo-itl", "0.001"), "--slo-itl 0.001: one sequence alone takes"),
        (("summarise", "--rate", "20", "--slo-ttft", "0.01"), "--slo-ttft 0.01: the middle prompt"),
        (("chat", "--rate", "0.01"), "say too little"),
    ],
)
def test_what_cannot_be_planned_is_one_line(monkeypatch, capsys, words, said):
    assert plan(monkeypatch, *words, "--profile", "llama2-70b-h100") == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_no_fleet_is_told(monkeypatch, capsys):
    words = ("chat", "--profile", "llama2-70b-h100", "--rate", "200", "--seconds", "5", "--max-workers", "1")
    assert plan(monkeypatch, *words) == 1
    assert "not with 1 workers" in capsys.readouterr().out
