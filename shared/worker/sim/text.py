"""From states to text: which token comes next, what it reads as, and where a choice ends.

The sim has no likelihoods. The next token is a function of the state of the last one (contents.py), of what the
prompt's pages hold beyond what they should (pages.py; 0), of the request's seed and of the choice's number, as an index
into a table of tokens whose texts stand alone. So temperature, top_p, top_k, min_p and penalties have nothing to act
on, and no end token ever comes.
"""

from bisect import bisect_left
from dataclasses import dataclass

from tokenizers import Tokenizer

from shared import wire
from shared.errors import InvalidRequest, SettingsError
from shared.worker.sim.contents import MASK, SETTLE, SPREAD, STIR, token_hash

TABLE = 4096  # tokens at most; spread over the vocabulary


class TokenTable:
    """`ids[i]` reads as `texts[i]`, wherever it stands. Ids are in order."""

    def __init__(self, ids: list[int], texts: list[str], vocabulary: int) -> None:
        self.ids = ids
        self.texts = texts
        self.hashes = [token_hash(token) for token in ids]
        self.vocabulary = vocabulary
        self.size = len(ids)

    def index(self, token: int) -> int:
        """Raises InvalidRequest for a token that is not in the table."""
        index = bisect_left(self.ids, token)
        if index == self.size or self.ids[index] != token:
            raise InvalidRequest("the sim engine never says one of the tokens that it is to repeat")
        return index

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocabulary: int) -> "TokenTable":
        """Raises SettingsError for a tokeniser without any such token."""
        special = set(tokenizer.get_added_tokens_decoder())
        count = tokenizer.get_vocab_size(with_added_tokens=False)
        usable = []
        for token in _spread_out(count):
            text = _text_alone(tokenizer, token)
            if token not in special and text and text.isprintable():
                usable.append((token, text))
                if len(usable) == TABLE:
                    break
        if not usable:
            raise SettingsError("setting 'model': the sim engine finds no printable token in its tokenizer.json")
        usable.sort()
        return cls([token for token, _ in usable], [text for _, text in usable], vocabulary)


def _spread_out(count: int) -> list[int]:
    """All ids, every part of the vocabulary early on."""
    stride = max(1, count // TABLE)
    return [token for start in range(stride) for token in range(start, count, stride)]


def _text_alone(tokenizer: Tokenizer, token: int) -> str:
    """As it reads after another token; some tokenisers drop the blank before a first word. Empty: not alone."""
    twice, thrice = (str(tokenizer.decode([token] * times, skip_special_tokens=False)) for times in (2, 3))
    text = thrice[len(twice) :]
    alone = "\ufffd" not in thrice and thrice == twice + text and twice.endswith(text) and len(text) * 2 >= len(twice)
    return text if alone else ""


class TokenSampler:
    """Of one choice: what `next` gives depends on its arguments and these alone."""

    __slots__ = ("_never", "_table", "key")

    def __init__(self, table: TokenTable, sampling: wire.Sampling, choice: int) -> None:
        self._table = table
        self.key = ((sampling.seed or 0) * SPREAD + choice * STIR) & MASK
        self._never = frozenset(sampling.stop_token_ids)

    def next(self, state: int, excess: int, *, may_stop: bool = True) -> int:
        """An index into the table. Without `may_stop`, below `min_tokens`, never a stop token if there is another."""
        mixed = (state ^ self.key) + excess & MASK
        mixed = (mixed ^ mixed >> 31) * SETTLE & MASK
        size = self._table.size
        index = (mixed >> 32) * size >> 32
        if not may_stop and self._never:
            for step in range(size):
                if self._table.ids[(index + step) % size] not in self._never:
                    return (index + step) % size
        return index


@dataclass(slots=True)
class TextEnding:
    """What a token did to its choice: the text that may go out now, and the end, if it is one."""

    text: str
    finish: wire.Finish | None = None


class Stops:
    """Where a choice with stop tokens or stop strings ends, as vLLM's detokeniser has it.

    Text that may be the beginning of a stop string is held back; what the stop string cuts off never goes out.
    """

    def __init__(self, sampling: wire.Sampling) -> None:
        self._sampling = sampling
        self._tokens = frozenset(sampling.stop_token_ids)
        longest = max((len(stop) for stop in sampling.stop), default=0)
        self._held = 0 if sampling.include_stop_str_in_output else max(0, longest - 1)
        self._text = ""
        self._sent = 0
        self._count = 0

    def push(self, token: int, text: str, *, is_last: bool) -> TextEnding:
        """`is_last`: the choice ends with this token anyway, at its length."""
        sampling = self._sampling
        self._count += 1
        if token in self._tokens:
            self._text += text if sampling.include_stop_str_in_output else ""
            return TextEnding(self._rest(), wire.Finish(reason="stop", stop_reason=token))
        before = len(self._text)
        self._text += text
        if self._count > sampling.min_tokens and (found := self._find(before)) is not None:
            stop, start = found
            self._text = self._text[: start + (len(stop) if sampling.include_stop_str_in_output else 0)]
            return TextEnding(self._rest(), wire.Finish(reason="stop", stop_reason=stop))
        if is_last:
            return TextEnding(self._rest(), wire.Finish(reason="length"))
        ready = max(self._sent, len(self._text) - self._held)
        out, self._sent = self._text[self._sent : ready], ready
        return TextEnding(out)

    def _find(self, before: int) -> tuple[str, int] | None:
        """The stop string that is complete earliest among those that end in the text from `before` on."""
        best: tuple[str, int] | None = None
        for stop in self._sampling.stop:
            start = self._text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0 and (best is None or start + len(stop) < best[1] + len(best[0])):
                best = stop, start
        return best

    def _rest(self) -> str:
        out, self._sent = self._text[self._sent :], len(self._text)
        return out
