"""Workload files, and the conversations that come of them."""

import random
import statistics

import pytest

from loadtest.load import workload
from loadtest.load.bodies import Tokeniser
from loadtest.load.conversation import cut, fitted
from loadtest.load.lengths import Distribution, LogNormal, count, draw
from loadtest.load.prompts import WORDS, Segment, mixed, text, token_ids
from loadtest.load.workload import Change
from shared.errors import SettingsError


def refusal(tmp_path, written: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(written)
    with pytest.raises(SettingsError) as caught:
        workload.load(path, Change())
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("promt_tokens: 5\noutput_tokens: 5", "promt_tokens"),
        ("prompt_tokens: 5", "output_tokens"),
        ("prompt_tokens: many\noutput_tokens: 5", "prompt_tokens"),
        ("prompt_tokens: {gauss: 5}\noutput_tokens: 5", "gauss"),
        ("prompt_tokens: {}\noutput_tokens: 5", "one of constant"),
        ("prompt_tokens: {constant: 1, uniform: [1, 2]}\noutput_tokens: 5", "one of constant"),
        ("prompt_tokens: {uniform: [9, 2]}\noutput_tokens: 5", "uniform"),
        ("prompt_tokens: {lognormal: {median: 0, sigma: 1, max: 5}}\noutput_tokens: 5", "lognormal"),
        ("prompt_tokens: {choice: []}\noutput_tokens: 5", "choice"),
        ("prompt_tokens: 5\noutput_tokens: 5\napi: rest", "api"),
        ("prompt_tokens: 5\noutput_tokens: 5\nshared_prefix: {groups: 0, tokens: 5}", "shared_prefix"),
        ("mix: [{workload: nothing-such}]", "nothing-such"),
        ("mix: [{workload: mixed}]", "is a mix itself"),
        ("mix: []", "mix"),
        ("mix: [{workload: chat, wait: 3}]", "wait"),
        ("[1, 2]", "mapping"),
        ("a: 1\nb: [", "line 2"),
        ("", "mapping"),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(tmp_path, written, words):
    assert words in refusal(tmp_path, written)


def test_a_missing_file(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        workload.load(tmp_path / "none.yaml", Change())


@pytest.mark.parametrize("name", workload.shipped())
def test_shipped_workloads(name):
    source = workload.load(workload.find(name), Change(seed=3))
    first = [source.conversation(index) for index in range(50)]
    assert first == [source.conversation(index) for index in range(50)]
    assert all(turn.new_tokens >= 1 and turn.output_tokens >= 1 for one in first for turn in one.turns)
    other = workload.load(workload.find(name), Change(seed=4))
    assert first != [other.conversation(index) for index in range(50)]


def test_there_are_these_kinds():
    assert workload.shipped() == [
        "agent-turns",
        "chat",
        "code-completion",
        "long-output",
        "long-prompt",
        "mixed",
        "overload",
        "summarise",
    ]


def test_a_mix_keeps_its_weights_and_its_parts_share_nothing():
    source = workload.load(workload.find("mixed"), Change(seed=3))
    conversations = [source.conversation(index) for index in range(2000)]
    assert sum(one.chat for one in conversations) / 2000 == pytest.approx(0.6, abs=0.05)
    streams = [turn.say[0].stream for one in conversations for turn in one.turns]
    assert len(set(streams)) == len(streams)


def test_groups_share_a_prefix_and_no_more():
    source = workload.load(workload.find("code-completion"), Change(seed=3, length_scale=0.5))
    some = [source.conversation(index) for index in range(200)]
    assert {one.system.tokens for one in some} == {256}
    assert len({one.system.stream for one in some}) == 16
    assert len({one.turns[0].say[0].stream for one in some}) == 200


def test_think_and_api_from_the_command_line():
    source = workload.load(workload.find("chat"), Change(api="completions", think_s=1.5))
    assert not source.conversation(0).chat
    assert source.conversation(0).turns[0].think_s == 1.5


@pytest.mark.parametrize(
    ("length", "mean"),
    [
        (7.0, 7.0),
        (Distribution(constant=3.0), 3.0),
        (Distribution(uniform=(10.0, 20.0)), 15.0),
        (Distribution(choice=[(1.0, 3.0), (9.0, 1.0)]), 3.0),
    ],
)
def test_lengths(length, mean):
    rng = random.Random(5)
    assert statistics.fmean(draw(length, rng) for _ in range(4000)) == pytest.approx(mean, rel=0.05)


def test_lognormal_has_its_median_and_its_limit():
    rng, length = random.Random(5), Distribution(lognormal=LogNormal(median=100.0, sigma=1.0, max=300.0))
    values = [draw(length, rng) for _ in range(4000)]
    assert statistics.median(values) == pytest.approx(100.0, rel=0.08)
    assert max(values) == 300.0


def test_counts_are_at_least_one():
    assert count(0.0, random.Random(1)) == 1
    assert count(10.0, random.Random(1), 0.01) == 1
    assert count(10.0, random.Random(1), 2.0) == 20


def test_tokens_depend_on_stream_and_place_only():
    one, two = Segment(5, 40), Segment(6, 10)
    assert token_ids(1, [one, two])[:40] == token_ids(1, [one])
    assert token_ids(1, [Segment(5, 100)])[:40] == token_ids(1, [one])
    assert token_ids(1, [one]) != token_ids(2, [one])
    assert token_ids(1, [one]) != token_ids(1, [Segment(7, 40)])
    assert token_ids(1, []) == []
    assert all(10 <= token < 200 for token in token_ids(1, [Segment(8, 5000)]))
    assert len(set(token_ids(1, [Segment(8, 5000)]))) == 190


def test_texts_have_as_many_words():
    words = text(1, [Segment(5, 40)]).split(" ")
    assert len(words) == 40
    assert set(words) <= set(WORDS)


def test_mixed_numbers_differ():
    assert len({mixed(a, b) for a in range(30) for b in range(30)}) == 900


@pytest.mark.parametrize(
    ("prompt", "output", "room", "expected"),
    [
        (10, 5, 100, (10, 5)),
        (95, 5, 100, (95, 5)),
        (200, 5, 100, (95, 5)),  # the prompt gives way
        (200, 80, 100, (50, 50)),  # down to half of the room
        (10, 500, 100, (10, 90)),  # a short prompt is not touched
        (5, 5, 2, (1, 1)),
    ],
)
def test_cut(prompt, output, room, expected):
    assert cut(prompt, output, room) == expected


def test_fitting_keeps_shared_beginnings_and_leaves_out_late_turns():
    source = workload.load(workload.find("agent-turns"), Change(seed=3))
    conversation = next(one for one in map(source.conversation, range(50)) if len(one.turns) > 3)
    assert fitted(conversation, 100_000) is conversation
    used = conversation.system.tokens + sum(turn.new_tokens + turn.output_tokens for turn in conversation.turns[:2])
    shorter = fitted(conversation, used)
    assert shorter.turns == conversation.turns[:2]
    assert shorter.system == conversation.system
    tiny = fitted(conversation, 200)
    assert len(tiny.turns) == 1
    assert tiny.system.stream == conversation.system.stream
    assert tiny.system.tokens + tiny.turns[0].new_tokens + tiny.turns[0].output_tokens <= 200
    assert tiny.turns[0].new_tokens >= 1


def test_words_for_tokens():
    tokeniser = Tokeniser(words_a_token=0.5, overhead_tokens=10.0)
    assert tokeniser.words(110, opening=True) == 50
    assert tokeniser.words(110, opening=False) == 55
    assert tokeniser.words(3, opening=True) == 1
