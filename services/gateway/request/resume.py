"""Going on elsewhere after a decode worker was lost mid-stream, so that the client sees a gap and nothing else. Pure.

Two ways. *By prompt*: what the client has becomes the end of a new prompt; right for requests whose next token depends
on the tokens before it alone. *By forcing*: the original prompt again, with what was sent as a replay that the engine
generates once more; for everything that depends on where the output began (penalties, a grammar, a seed, log
probabilities, stop strings that may be half matched), and for several choices.

Invariants: what is generated again is compared with what the client has, and never told twice; a stream whose
repetition differs ends in ResumeInexact.
"""

from array import array
from collections.abc import Sequence

import msgspec

from services.gateway.answer.render import Row
from shared import wire
from shared.errors import ResumeInexact


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What an attempt asks for: a prompt, and how it is to be answered."""

    tokens: list[int]
    packed: bytes
    sampling: wire.Sampling
    salt: bytes = b""  # of the tenant's KV blocks
    replay: Sequence[bytes] = ()  # packed ids with which each choice begins; empty: nothing is repeated


def work_after(work: Work, sent: list[int], replay: Sequence[bytes]) -> Work:
    """The same with these tokens already answered, and then those to be repeated."""
    tokens = work.tokens + sent
    sampling = msgspec.structs.replace(work.sampling, max_tokens=work.sampling.max_tokens - len(sent))
    packed = wire.pack_tokens(tokens) if sent else work.packed
    again = replay if any(replay) else ()
    return Work(tokens=tokens, packed=packed, sampling=sampling, salt=work.salt, replay=again)


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
    """What the client has of one choice, over all attempts.

    Tokens and their text do not come together: half a character, or of a stop string, is held back.
    """

    __slots__ = (
        "_clean", "_due", "_prompt_scores", "_scores", "_shown", "_text",
        "ended", "lengths", "repeats", "sizes", "tokens",
    )  # fmt: skip

    def __init__(self) -> None:
        self.tokens = bytearray()  # packed
        self.sizes = array("I")  # of each row since `_fold`: bytes of its tokens,
        self.lengths = array("I")  # and characters of its text
        self.ended = False
        self._text = 0  # characters, of rows before those
        self._scores = 0  # log probabilities
        self._prompt_scores = 0
        # Bytes of tokens and characters up to a row with text; and up to one whose text is known to be all there is:
        # text behind a single token is, but of several the last one's may be held back.
        self._shown = (0, 0)
        self._clean = (0, 0)
        self.repeats = False  # an attempt still has to repeat something
        self._due = (0, 0, 0, 0)  # of that: bytes of tokens, characters, log probabilities of output and of prompt

    @property
    def count(self) -> int:
        return len(self.tokens) // wire.TOKEN_BYTES

    @property
    def has_begun(self) -> bool:
        return bool(self.tokens or self._prompt_scores or self.ended or self.sizes)

    @property
    def replay(self) -> bytes:
        """What is still to be repeated."""
        return bytes(self.tokens[len(self.tokens) - self._due[0] :])

    def take(self, row: Row) -> Row | None:
        """Note a row on its way to the client; what it has already is taken out. None: nothing is new.

        Raises ResumeInexact. A plain row while nothing repeats needs no more than tokens, sizes and lengths appended.
        """
        size = len(row.tokens)
        if self.repeats:
            new = self._without_known(row)
            if new is None:
                return None
            row = new
            self._fold()
            self.tokens += row.tokens
            self._text += len(row.text)
            if row.text and not self.repeats:
                self._shown = len(self.tokens), self._text
                if size == wire.TOKEN_BYTES:
                    self._clean = self._shown
        else:
            self.tokens += row.tokens
            self.sizes.append(size)
            self.lengths.append(len(row.text))
        if row.logprobs is not None:
            self._scores += len(row.logprobs)
        if row.prompt_logprobs is not None:
            self._prompt_scores += len(row.prompt_logprobs)
        if row.finish is not None:
            self.ended = True
        return row

    def resume(self, *, by_prompt: bool, forces: bool) -> list[int]:
        """By prompt: the tokens for it. What comes after them, or everything, will be repeated.

        Unless there is a worker that `forces`, as little as can be is repeated.
        """
        self._fold()
        whole, text = (self._clean if forces else self._shown) if by_prompt else (0, 0)
        self._due = len(self.tokens) - whole, self._text - text, self._scores, self._prompt_scores
        self.repeats = self.ended or any(self._due)
        return wire.unpack_tokens(bytes(self.tokens[:whole]))

    def _fold(self) -> None:
        """From the rows to what they add up to."""
        at = len(self.tokens) - sum(self.sizes)
        for size, length in zip(self.sizes, self.lengths, strict=True):
            at += size
            self._text += length
            if length:
                self._shown = at, self._text
                if size == wire.TOKEN_BYTES:
                    self._clean = self._shown
        self.sizes, self.lengths = array("I"), array("I")

    def _without_known(self, row: Row) -> Row | None:
        tokens_due, text_due, scores_due, prompt_scores_due = self._due
        known = min(tokens_due, len(row.tokens))
        at = len(self.tokens) - tokens_due
        text = min(text_due, len(row.text))
        scores = min(scores_due, len(row.logprobs or ()))
        prompt_scores = min(prompt_scores_due, len(row.prompt_logprobs or ()))
        if row.tokens[:known] != self.tokens[at : at + known]:
            raise ResumeInexact("the stream could not be continued exactly")
        self._due = tokens_due - known, text_due - text, scores_due - scores, prompt_scores_due - prompt_scores
        new = msgspec.structs.replace(
            row,
            tokens=row.tokens[known:],
            text=row.text[text:],
            logprobs=None if row.logprobs is None else row.logprobs[scores:],
            prompt_logprobs=None if row.prompt_logprobs is None else row.prompt_logprobs[prompt_scores:],
        )
        # An output that ends before all that was sent, or goes on behind its end, is another one.
        early = row.finish is not None and any(self._due[:3])
        if early or (self.ended and any((new.tokens, new.text))):
            raise ResumeInexact("the stream could not be continued exactly")
        self.repeats = self.ended or any(self._due)
        if new.finish is None or self.ended:
            return new if any((new.tokens, new.text, new.logprobs, new.prompt_logprobs)) else None
        return new
