"""From a turn to the bytes of its request. Texts are as long as the model's own tokeniser makes them, about."""

from typing import Any

import msgspec

from loadtest.load.conversation import Conversation, Turn
from loadtest.load.prompts import Segment, text, token_ids

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_encode = msgspec.json.Encoder().encode


class Tokeniser(msgspec.Struct, frozen=True, kw_only=True):
    """How the server counts chat messages: a straight line through two that it was asked for."""

    words_a_token: float = 1.0
    overhead_tokens: float = 0.0  # of the template

    def words(self, tokens: int, *, opening: bool) -> int:
        """Words for so many tokens; the first message also carries the template."""
        wanted = tokens - (self.overhead_tokens if opening else 0.0)
        return max(1, round(wanted * self.words_a_token))


class Bodies(msgspec.Struct, frozen=True, kw_only=True):
    """What all bodies of a run have in common."""

    model: str
    seed: int
    tokeniser: Tokeniser

    def dialogue(self, conversation: Conversation) -> "Dialogue":
        return Dialogue(self, conversation)


class Dialogue:
    """A conversation as it goes on: what has been said so far is part of each request."""

    def __init__(self, bodies: Bodies, conversation: Conversation) -> None:
        self._bodies, self._conversation = bodies, conversation
        self._messages: list[dict[str, str]] = []
        self._tokens: list[int] = []
        self._next = 0
        self.path = CHAT if conversation.chat else COMPLETIONS

    @property
    def goes_on(self) -> bool:
        """After the turn that was said last."""
        return self._next < len(self._conversation.turns)

    @property
    def turn(self) -> Turn:
        """The one that is next."""
        return self._conversation.turns[self._next]

    @property
    def said(self) -> Turn:
        """The one that was said last."""
        return self._conversation.turns[self._next - 1]

    @property
    def tokens(self) -> list[int]:
        """The prompt said last, of a completion."""
        return self._tokens

    def say(self) -> bytes:
        """The body of the next turn."""
        turn, opening = self.turn, self._next == 0
        self._next += 1
        body: dict[str, Any] = {"model": self._bodies.model}
        if self._conversation.chat:
            self._add_messages(turn, opening=opening)
            body["messages"] = self._messages
        else:
            system = (self._conversation.system,) if opening and self._conversation.system else ()
            self._tokens = self._tokens + token_ids(self._bodies.seed, (*system, *turn.say))
            body["prompt"] = self._tokens
            if self.goes_on:
                body["return_token_ids"] = True  # the answer is part of the next prompt
        body |= {
            "max_tokens": turn.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return _encode(body)

    def heard(self, answer: str, tokens: list[int]) -> None:
        """The answer to the turn said last."""
        if self._conversation.chat:
            self._messages.append({"role": "assistant", "content": answer})
        else:
            self._tokens = self._tokens + tokens

    def _add_messages(self, turn: Turn, *, opening: bool) -> None:
        system = self._conversation.system if opening else None
        if system is not None:
            self._messages.append({"role": "system", "content": self._text((system,), opening=True)})
        self._messages.append({"role": "user", "content": self._text(turn.say, opening=opening and system is None)})

    def _text(self, segments: tuple[Segment, ...], *, opening: bool) -> str:
        tokens = sum(segment.tokens for segment in segments)
        words = self._bodies.tokeniser.words(tokens, opening=opening)
        # Segment by segment, so that equal beginnings stay equal texts.
        share = words / max(1, tokens)
        scaled = [msgspec.structs.replace(one, tokens=max(1, round(one.tokens * share))) for one in segments]
        return text(self._bodies.seed, scaled)
