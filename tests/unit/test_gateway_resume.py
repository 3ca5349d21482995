"""What may be resumed and how, and what the client has of a choice whatever was lost on the way."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.answer.render import Row
from services.gateway.request.resume import Sent, Work, goes_on_by_prompt, repeats_itself, work_after
from shared import wire
from shared.errors import ResumeInexact

GREEDY = {"max_tokens": 9, "temperature": 0.0}
LENGTH = wire.Finish(reason="length")


@pytest.mark.parametrize(
    ("more", "by_prompt"),
    [
        ({}, True),
        ({"ignore_eos": True}, True),
        ({"logit_bias": {5: 1.0}}, True),
        ({"stop_token_ids": [7]}, True),
        ({"repetition_penalty": 1.2}, True),
        ({"seed": 3}, True),
        ({"temperature": 0.1}, True),
        ({"temperature": None}, True),
        ({"temperature": 0.1, "seed": 3}, False),
        ({"temperature": None, "seed": 3}, False),
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
def test_by_prompt_only_what_depends_on_the_tokens_alone(more, by_prompt):
    assert goes_on_by_prompt(wire.Sampling(**{**GREEDY, **more})) is by_prompt


@pytest.mark.parametrize(
    ("more", "itself"), [({}, True), ({"temperature": 0.1}, False), ({"temperature": None}, False), ({"n": 2}, False)]
)
def test_greedy_repeats_itself(more, itself):
    assert repeats_itself(wire.Sampling(**{**GREEDY, **more})) is itself


def test_the_next_attempt_has_what_was_sent_as_prompt():
    work = Work(tokens=[1, 2], packed=wire.pack_tokens([1, 2]), sampling=wire.Sampling(**GREEDY), salt=b"s")
    again = work_after(work, [7, 8], [wire.pack_tokens([9])])
    assert again.tokens == wire.unpack_tokens(again.packed) == [1, 2, 7, 8]
    assert again.sampling.max_tokens == 7
    assert again.replay == [wire.pack_tokens([9])]
    assert again.salt == b"s"
    assert work.tokens == [1, 2]
    assert work_after(work, [], [b"", b""]) == work


def take(sent, rows):
    return [new for one in rows if (new := sent.take(one)) is not None]


def resume(sent, **ways):
    return sent.resume(**ways), [sent.replay]


def row(text, *tokens, **more):
    return Row(choice=0, text=text, tokens=wire.pack_tokens(list(tokens)), **more)


def score(token):
    return wire.TokenLogprob(token=str(token), token_id=token, logprob=-1.0)


def ids(rows):
    return [token for one in rows for token in wire.unpack_tokens(one.tokens)]


def test_rows_pass_unchanged_while_nothing_is_lost():
    sent, rows = Sent(), [row("a", 1), row("", 2), row("bc", 3, 4), row("d", 5)]
    assert not sent.has_begun
    assert take(sent, rows) == rows
    assert (sent.count, sent.has_begun) == (5, True)
    assert resume(sent, by_prompt=True, forces=True) == ([1, 2, 3, 4, 5], [b""])


def test_a_token_without_its_text_is_repeated():
    sent = Sent()
    take(sent, [row("a", 1), row("", 2), row("", 3)])
    assert resume(sent, by_prompt=True, forces=True) == ([1], [wire.pack_tokens([2, 3])])
    assert take(sent, [row("", 2), row("", 3)]) == []
    assert take(sent, [row("é", 4)]) == [row("é", 4)]
    assert resume(sent, by_prompt=True, forces=True) == ([1, 2, 3, 4], [b""])


def test_the_last_of_several_tokens_may_have_no_text_yet():
    sent = Sent()
    take(sent, [row("a", 1), row("bc", 2, 3)])
    assert resume(sent, by_prompt=True, forces=True) == ([1], [wire.pack_tokens([2, 3])])
    told = take(sent, [row("b", 2), row("", 3), row("cé", 4)])
    assert (ids(told), "".join(one.text for one in told)) == ([4], "é")


def test_where_nobody_forces_little_is_repeated():
    sent = Sent()
    take(sent, [row("a", 1), row("bc", 2, 3), row("", 4)])
    assert resume(sent, by_prompt=True, forces=False) == ([1, 2, 3], [wire.pack_tokens([4])])


def test_lost_again_during_the_repetition():
    sent = Sent()
    take(sent, [row("a", 1), row("b", 2), row("c", 3)])
    whole = [], [wire.pack_tokens([1, 2, 3])]
    assert resume(sent, by_prompt=False, forces=True) == whole
    assert take(sent, [row("a", 1), row("b", 2)]) == []
    assert resume(sent, by_prompt=False, forces=True) == whole
    assert take(sent, [row("abcd", 1, 2, 3, 4)]) == [row("d", 4)]
    assert sent.count == 4


def test_a_choice_that_has_ended_is_repeated_whole():
    sent, rows = Sent(), [row("a", 1, finish=LENGTH)]
    assert take(sent, rows) == rows
    assert resume(sent, by_prompt=False, forces=True) == ([], [wire.pack_tokens([1])])
    assert take(sent, rows) == []
    assert sent.count == 1


def test_the_prompts_log_probabilities_are_told_once():
    scores = [None, score(1)]
    pieces = [row("", prompt_logprobs=scores[:1]), row("", prompt_logprobs=scores[1:])]
    sent = Sent()
    assert take(sent, pieces[:1]) == pieces[:1]
    assert resume(sent, by_prompt=False, forces=True) == ([], [b""])
    assert take(sent, [*pieces, row("x", 5)]) == [pieces[1], row("x", 5)]


@pytest.mark.parametrize(
    "again",
    [[row("x", 9)], [row("a", 1, finish=LENGTH)], [row("a", 1), row("b", 3)]],
    ids=["other tokens", "an end too early", "other tokens later"],
)
def test_a_repetition_that_differs_ends_the_stream(again):
    sent = Sent()
    take(sent, [row("a", 1), row("b", 2)])
    resume(sent, by_prompt=False, forces=True)
    with pytest.raises(ResumeInexact):
        take(sent, again)


def test_nothing_may_follow_the_end_of_a_choice():
    sent = Sent()
    take(sent, [row("a", 1, finish=LENGTH)])
    resume(sent, by_prompt=False, forces=True)
    with pytest.raises(ResumeInexact):
        take(sent, [row("a", 1), row("b", 2)])


# ---- any text, cut in any way, lost anywhere -------------------------------------------------------------------------


@dataclass
class Output:
    """What an engine says: a token's text is ready some tokens later, in order."""

    texts: list[str]
    held: list[bool]  # half a character: the text of these comes with the next one that is not held
    held_chars: int  # as many characters as may begin a stop string are kept back to the end
    scored: bool  # with log probabilities
    tokens: list[int] = field(init=False)

    def __post_init__(self):
        self.tokens = list(range(100, 100 + len(self.texts)))

    def ready(self, start, count):
        """The text that is out when an attempt that began at `start` has made so many tokens."""
        if count == len(self.texts):
            return "".join(self.texts[start:])
        while count > start and self.held[count - 1]:
            count -= 1
        text = "".join(self.texts[start:count])
        return text[: max(0, len(text) - self.held_chars)]

    def rows(self, start, sizes):
        """From `start` to the end, so many tokens a row."""
        rows, at, out = [], start, ""
        while at < len(self.texts):
            end = min(len(self.texts), at + max(1, next(sizes)))
            ready = self.ready(start, end)
            scores = [score(token) for token in self.tokens[at:end]]
            rows.append(
                row(
                    ready[len(out) :],
                    *self.tokens[at:end],
                    logprobs=scores if self.scored else None,
                    finish=LENGTH if end == len(self.texts) else None,
                )
            )
            at, out = end, ready
        return rows


outputs = st.lists(st.tuples(st.text("abé", max_size=3), st.booleans()), min_size=1, max_size=14)


@given(
    outputs,
    st.integers(0, 4),
    st.lists(st.integers(0, 14), max_size=5),
    st.lists(st.integers(1, 4), min_size=1),
    st.booleans(),
)
def test_every_token_and_character_is_told_once(output, held_chars, losses, sizes, by_prompt):
    """`losses`: after how many rows each attempt dies; `sizes`: of rows, in turn."""
    texts, held = [text for text, _ in output], [one for _, one in output]
    said = Output(texts, held, 0 if by_prompt else held_chars, scored=not by_prompt)

    def turns():
        while True:
            yield from sizes

    turn, sent, told, start = turns(), Sent(), [], 0
    for rows_seen in losses:
        rows = said.rows(start, turn)
        if rows_seen >= len(rows):
            break
        told += take(sent, rows[:rows_seen])
        whole, (replay,) = resume(sent, by_prompt=by_prompt, forces=True)
        assert whole + wire.unpack_tokens(replay) == said.tokens[: sent.count]
        start = len(whole)
        assert by_prompt or not start
    told += take(sent, said.rows(start, turn))
    assert ids(told) == said.tokens
    assert "".join(one.text for one in told) == "".join(texts)
    assert sent.count == len(texts)
    assert [one.finish for one in told if one.finish] == [LENGTH]
    if not by_prompt:
        assert [score.token_id for one in told for score in one.logprobs] == said.tokens
