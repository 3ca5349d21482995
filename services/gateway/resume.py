"""Going on elsewhere after a decode worker was lost mid-stream, so that the client sees a gap and nothing else. Pure.

Two ways. *By prompt*: what the client has becomes the end of a new prompt; right for requests whose next token depends
on the tokens before it alone. *By forcing*: the original prompt again, with what was sent as a replay that the engine
generates once more; for everything that depends on where the output began (penalties, a grammar, a seed, log
probabilities, stop strings that may be half matched), and for several choices.

Invariants: what is generated again is compared with what the client has, and never told twice; a stream whose
repetition differs ends in ResumeInexact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import msgspec

from services.gateway.streams import Row
from shared import wire
from shared.errors import ResumeInexact


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a leg carries: a prompt, and how it is to be answered."""

    id: str  # the request's name on the bus
    tokens: list[int]
    packed: bytes
    sampling: wire.Sampling
    first_choice: int  # the number of its first choice in the client's answer
    salt: bytes = b""  # of the tenant's KV blocks
    replay: Sequence[bytes] = ()  # packed ids with which each choice begins; empty: nothing is repeated

    def after(self, sent: list[int], replay: Sequence[bytes]) -> Self:
        """The same with these tokens already answered, and then those to be repeated."""
        tokens = self.tokens + sent
        left = self.sampling.max_tokens - len(sent)
        sampling = msgspec.structs.replace(self.sampling, max_tokens=left)
        packed = wire.pack_tokens(tokens) if sent else self.packed
        return replace(self, tokens=tokens, packed=packed, sampling=sampling, replay=replay if any(replay) else ())


def goes_on_by_prompt(sampling: wire.Sampling) -> bool:
    """Whether the tokens sent, as prompt, lead to what would have followed, or to a sample as good.

    A repetition penalty counts the prompt's tokens like the output's.
    """
    return (
        (sampling.seed is None or sampling.temperature == 0)
        and sampling.n == 1
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
        and not sampling.stop
        and not sampling.bad_words  # of several tokens: looked for in the output only
        and not sampling.min_tokens
        and sampling.logprobs is None
        and sampling.prompt_logprobs is None
        and not sampling.structured
    )


def repeats_itself(sampling: wire.Sampling) -> bool:
    """Whether an engine that cannot be forced chooses the same tokens anyway."""
    return sampling.temperature == 0 and goes_on_by_prompt(sampling)


class Sent:
    """What the client has of every choice of a leg, over all attempts."""

    def __init__(self, first: int, choices: int) -> None:
        """`first`: the client's number of the first choice."""
        self._first = first
        self._choices = [_Choice() for _ in range(choices)]
        self.has_begun = False

    @property
    def count(self) -> int:
        """Completion tokens so far."""
        return sum(choice.count for choice in self._choices)

    @property
    def repeats(self) -> bool:
        """Something that the client has is still to come again."""
        return any(choice.repeats for choice in self._choices)

    def take(self, rows: list[Row]) -> list[Row]:
        """Note the rows on their way to the client; returns them without what it has already. Raises ResumeInexact."""
        self.has_begun = True
        choices, first = self._choices, self._first
        return [new for row in rows if (new := choices[row.choice - first].take(row)) is not None]

    def resume(self, *, by_prompt: bool, forces: bool) -> tuple[list[int], list[bytes]]:
        """The tokens for the next attempt's prompt, and its replay: what the attempt will repeat.

        Unless there is a worker that `forces`, as little as can be is repeated.
        """
        (whole, *_) = [choice.resume(by_prompt=by_prompt, forces=forces) for choice in self._choices]
        return whole, [choice.replay for choice in self._choices]


class _Choice:
    """One choice. Tokens and their text do not come together: half a character, or of a stop string, is held back."""

    def __init__(self) -> None:
        self._tokens = bytearray()  # packed
        self._text = 0  # characters
        self._scores = 0  # log probabilities
        self._prompt_scores = 0
        self._ended = False
        # Bytes of tokens and characters up to a row with text; and up to one whose text is known to be all there is:
        # text behind a single token is, but of several the last one's may be held back.
        self._shown = (0, 0)
        self._clean = (0, 0)
        # What of the above an attempt still has to repeat.
        self.repeats = False
        self._tokens_due = 0  # bytes
        self._text_due = 0
        self._scores_due = 0
        self._prompt_scores_due = 0

    @property
    def count(self) -> int:
        return len(self._tokens) // wire.TOKEN_BYTES

    @property
    def replay(self) -> bytes:
        """What is still to be repeated."""
        return bytes(self._tokens[len(self._tokens) - self._tokens_due :])

    def take(self, row: Row) -> Row | None:
        """None: nothing of it is new."""
        size = len(row.tokens)
        if self.repeats:
            new = self._without_known(row)
            if new is None:
                return None
            row = new
        self._tokens += row.tokens
        self._text += len(row.text)
        if row.logprobs is not None:
            self._scores += len(row.logprobs)
        if row.prompt_logprobs is not None:
            self._prompt_scores += len(row.prompt_logprobs)
        if row.finish is not None:
            self._ended = True
        if row.text and not self.repeats:
            self._shown = len(self._tokens), self._text
            if size == wire.TOKEN_BYTES:
                self._clean = self._shown
        return row

    def resume(self, *, by_prompt: bool, forces: bool) -> list[int]:
        """By prompt: the tokens for it. What comes after them, or everything, will be repeated."""
        whole, text = (self._clean if forces else self._shown) if by_prompt else (0, 0)
        self._tokens_due = len(self._tokens) - whole
        self._text_due = self._text - text
        self._scores_due = self._scores
        self._prompt_scores_due = self._prompt_scores
        self.repeats = self._is_due
        return wire.unpack_tokens(bytes(self._tokens[:whole]))

    @property
    def _is_due(self) -> bool:
        return self._ended or any((self._tokens_due, self._text_due, self._scores_due, self._prompt_scores_due))

    def _without_known(self, row: Row) -> Row | None:
        known = min(self._tokens_due, len(row.tokens))
        at = len(self._tokens) - self._tokens_due
        text = min(self._text_due, len(row.text))
        scores = min(self._scores_due, len(row.logprobs or ()))
        prompt_scores = min(self._prompt_scores_due, len(row.prompt_logprobs or ()))
        if row.tokens[:known] != self._tokens[at : at + known]:
            raise ResumeInexact("the stream could not be continued exactly")
        self._tokens_due -= known
        self._text_due -= text
        self._scores_due -= scores
        self._prompt_scores_due -= prompt_scores
        new = msgspec.structs.replace(
            row,
            tokens=row.tokens[known:],
            text=row.text[text:],
            logprobs=None if row.logprobs is None else row.logprobs[scores:],
            prompt_logprobs=None if row.prompt_logprobs is None else row.prompt_logprobs[prompt_scores:],
        )
        self._check_end(row, new)
        self.repeats = self._is_due
        if new.finish is None or self._ended:
            return new if any((new.tokens, new.text, new.logprobs, new.prompt_logprobs)) else None
        return new

    def _check_end(self, row: Row, new: Row) -> None:
        """An output that ends before all that was sent, or goes on behind its end, is another one."""
        early = row.finish is not None and any((self._tokens_due, self._text_due, self._scores_due))
        if early or (self._ended and any((new.tokens, new.text))):
            raise ResumeInexact("the stream could not be continued exactly")
