"""Going on elsewhere after a decode worker was lost mid-stream: what the client has becomes the end of a new prompt.

Exact for plain greedy requests: the next token depends on the tokens before it alone, whoever computes it. What
depends on where the output began (penalties, a grammar, a seed, log probabilities, stop strings that may be half
matched) would differ, so those requests are not resumed here. Pure.
"""

from dataclasses import dataclass, replace
from typing import Self

import msgspec

from services.gateway.streams import Row
from shared import wire


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a leg carries: a prompt, and how it is to be answered."""

    id: str  # the request's name on the bus
    tokens: list[int]
    packed: bytes
    sampling: wire.Sampling
    first_choice: int  # the number of its first choice in the client's answer

    def after(self, sent: list[int]) -> Self:
        """The same with these tokens already answered."""
        tokens = self.tokens + sent
        left = self.sampling.max_tokens - len(sent)
        sampling = msgspec.structs.replace(self.sampling, max_tokens=left)
        return replace(self, tokens=tokens, packed=wire.pack_tokens(tokens), sampling=sampling)


def is_resumable(sampling: wire.Sampling) -> bool:
    """Whether the tokens sent, as prompt, lead to the very text that would have followed."""
    return (
        sampling.temperature == 0
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


class Sent:
    """The tokens of a choice that the client has, over all attempts.

    A token whose text was held back (half of a character) cannot be part of the new prompt: its other half would be
    decoded without it. Such tokens, `_held`, are generated again, and left out of the rows when they come.
    """

    def __init__(self) -> None:
        self._whole = bytearray()  # packed; with all their text
        self._held = bytearray()  # after those
        self._again = 0  # bytes of those that are still to come a second time

    @property
    def count(self) -> int:
        """Completion tokens so far."""
        return (len(self._whole) + len(self._held)) // wire.TOKEN_BYTES

    def take(self, rows: list[Row]) -> list[Row]:
        """Note the rows on their way to the client; returns them without what it has already."""
        return [self._take(row) for row in rows]

    def _take(self, row: Row) -> Row:
        known = 0
        if self._again:
            known = min(self._again, len(row.tokens))
            self._again -= known
        new = row.tokens[known:]
        if self._held or not row.text:
            self._held += new
            # While old tokens come again the text of the new ones is not there either.
            if row.text and not self._again:
                self._whole += self._held
                self._held.clear()
        else:
            self._whole += new
        return msgspec.structs.replace(row, tokens=new) if known else row

    def resume(self) -> list[int]:
        """The tokens for the next attempt's prompt."""
        self._again = len(self._held)
        return wire.unpack_tokens(bytes(self._whole))
