"""From a workload or a trace to the requests that arrive: when, how long, how much of it is cached. Pure."""

from collections.abc import Iterator, Sequence

import msgspec

from loadtest.load.conversation import Conversation, Source, cut


class Demand(msgspec.Struct, frozen=True, gc=False):
    """One request. `cached_tokens`: of its prompt, not to be computed."""

    at_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


def demands(
    source: Source, arrivals_s: Sequence[float], *, room_tokens: int, cached_share: float, pace_s: float
) -> list[Demand]:
    """Ascending by time.

    A later turn comes when the answer before it has been streamed at `pace_s` a token, and its client has thought.

    Args:
        source: of conversations, one an arrival.
        arrivals_s: when their first turns come.
        room_tokens: what a prompt and its output may have together; longer ones are cut as `loadtest run` cuts them.
        cached_share: of each prompt's tokens, 0 to 1.
        pace_s: of a token.
    """
    found = [
        demand
        for index, at_s in enumerate(arrivals_s)
        for demand in _turns(source.conversation(index), at_s, room_tokens, cached_share, pace_s)
    ]
    return sorted(found, key=lambda demand: demand.at_s)


def _turns(
    conversation: Conversation, at_s: float, room_tokens: int, cached_share: float, pace_s: float
) -> Iterator[Demand]:
    before = conversation.system.tokens if conversation.system else 0
    for number, turn in enumerate(conversation.turns):
        if number:
            at_s += turn.think_s
        wanted = before + turn.new_tokens
        prompt, output = cut(wanted, turn.output_tokens, room_tokens)
        # The last token is always computed: the first of the answer is sampled behind it.
        yield Demand(at_s, prompt, min(prompt - 1, int(cached_share * prompt)), output)
        if (prompt, output) != (wanted, turn.output_tokens):
            return  # there is no room for another turn
        at_s += output * pace_s
        before = wanted + output
