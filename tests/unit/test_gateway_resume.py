"""What may be resumed, and the tokens that the client has."""

import pytest

from services.gateway.resume import Load, Sent, is_resumable
from services.gateway.streams import Row
from shared import wire

GREEDY = {"max_tokens": 9, "temperature": 0.0}


@pytest.mark.parametrize(
    ("more", "resumable"),
    [
        ({}, True),
        ({"ignore_eos": True}, True),
        ({"logit_bias": {5: 1.0}}, True),
        ({"stop_token_ids": [7]}, True),
        ({"temperature": 0.1}, False),
        ({"temperature": None}, False),
        ({"n": 2}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"stop": ["x"]}, False),
        ({"bad_words": ["x"]}, False),
        ({"min_tokens": 3}, False),
        ({"logprobs": 0}, False),
        ({"prompt_logprobs": 0}, False),
        ({"structured": {"json_object": True}}, False),
    ],
)
def test_plain_greedy_requests_only(more, resumable):
    assert is_resumable(wire.Sampling(**{**GREEDY, **more})) is resumable


def test_the_next_attempt_has_what_was_sent_as_prompt():
    load = Load(
        id="r", tokens=[1, 2], packed=wire.pack_tokens([1, 2]), sampling=wire.Sampling(**GREEDY), first_choice=4
    )
    again = load.after([7, 8])
    assert (again.id, again.first_choice) == ("r", 4)
    assert again.tokens == wire.unpack_tokens(again.packed) == [1, 2, 7, 8]
    assert again.sampling.max_tokens == 7
    assert load.tokens == [1, 2]


def row(text, *tokens):
    return Row(choice=0, text=text, tokens=wire.pack_tokens(list(tokens)))


def test_rows_pass_unchanged_while_nothing_is_lost():
    sent, rows = Sent(), [row("a", 1), row("", 2), row("bc", 3, 4)]
    assert sent.take(rows) == rows
    assert sent.count == 4
    assert sent.resume() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "again",
    [
        [row("", 2), row("", 3), row("é", 4)],
        [row("", 2, 3), row("é", 4)],
        [row("é", 2, 3, 4)],
    ],
    ids=["one by one", "two at once", "all at once"],
)
def test_held_tokens_come_again_and_are_told_once(again):
    sent = Sent()
    sent.take([row("a", 1), row("", 2), row("", 3)])
    assert sent.resume() == [1]
    told = sent.take(again)
    assert [token for one in told for token in wire.unpack_tokens(one.tokens)] == [4]
    assert "".join(one.text for one in told) == "é"
    assert sent.count == 4
    assert sent.resume() == [1, 2, 3, 4]


def test_lost_again_before_the_held_tokens_have_come():
    sent = Sent()
    sent.take([row("a", 1), row("", 2), row("", 3)])
    sent.resume()
    sent.take([row("", 2)])
    assert sent.resume() == [1]
    told = sent.take([row("", 2), row("", 3), row("é", 4)])
    assert [token for one in told for token in wire.unpack_tokens(one.tokens)] == [4]
    assert sent.count == 4


def test_rows_without_tokens_change_nothing():
    sent = Sent()
    sent.take([row("a", 1), row("", 2)])
    sent.take([row("")])
    assert sent.count == 2
    assert sent.resume() == [1]
