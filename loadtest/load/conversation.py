"""What a client will say, before anything is sent: turns of so many tokens, cut to what the model can take. Pure."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from loadtest.load.prompts import Segment


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """`say`: what is new in this turn. `think_s`: from the answer before it to its sending."""

    say: tuple[Segment, ...]
    output_tokens: int
    think_s: float = 0.0

    @property
    def new_tokens(self) -> int:
        return sum(segment.tokens for segment in self.say)


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """One turn is a single request. `system`: what it begins with, shared with others of its group."""

    chat: bool
    turns: tuple[Turn, ...]
    system: Segment | None = None


class Source(Protocol):
    """Where conversations come from: a workload or a trace. Equal seeds give equal conversations."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int | None:
        """How many there are; None: as many as wanted."""

    @property
    def arrivals_s(self) -> Sequence[float] | None:
        """Its own, if it has some; ascending from 0."""

    def conversation(self, index: int) -> Conversation: ...
    def described(self) -> dict[str, object]:
        """For the result's settings."""


def cut(prompt: int, output: int, room: int) -> tuple[int, int]:
    """A prompt and an output that fit: the prompt gives way first, down to half of the room, then the output."""
    if prompt + output <= room:
        return prompt, output
    shorter = max(1, min(prompt, max(room - output, room // 2)))
    return shorter, max(1, room - shorter)


def fitted(conversation: Conversation, room: int) -> Conversation:
    """The same object when it fits as it is; otherwise its first turn is cut, and turns too many are left out."""
    used = conversation.system.tokens if conversation.system else 0
    kept: list[Turn] = []
    for turn in conversation.turns:
        if used + turn.new_tokens + turn.output_tokens > room:
            break
        used += turn.new_tokens + turn.output_tokens
        kept.append(turn)
    if len(kept) == len(conversation.turns):
        return conversation
    if kept:
        return msgspec.structs.replace(conversation, turns=tuple(kept))
    return _first_turn_cut(conversation, room)


def _first_turn_cut(conversation: Conversation, room: int) -> Conversation:
    system, turn = conversation.system, conversation.turns[0]
    before = system.tokens if system else 0
    prompt, output = cut(before + turn.new_tokens, turn.output_tokens, room)
    if system is not None:
        system = Segment(system.stream, min(system.tokens, max(0, prompt - 1)))
        prompt -= system.tokens
    say = _beginning(turn.say, prompt)
    return msgspec.structs.replace(
        conversation,
        system=system if system and system.tokens else None,
        turns=(msgspec.structs.replace(turn, say=say, output_tokens=output),),
    )


def _beginning(segments: Sequence[Segment], tokens: int) -> tuple[Segment, ...]:
    kept: list[Segment] = []
    for segment in segments:
        if tokens <= 0:
            break
        kept.append(Segment(segment.stream, min(segment.tokens, tokens)))
        tokens -= segment.tokens
    return tuple(kept)
