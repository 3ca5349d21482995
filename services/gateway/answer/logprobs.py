"""Log probabilities in OpenAI's two shapes: a list of objects for chat, four parallel arrays for completions."""

from typing import Any

from shared import wire

FLOOR = -9999.0  # JSON has no infinity; vLLM shows this

Positions = list[wire.TokenLogprob | None]  # of a prompt; None: its first token has no probability


def render(chat: bool, tokens: list[wire.TokenLogprob] | None, top: int | None, offset: int) -> dict[str, Any] | None:
    """None unless they were asked for. `offset`: characters of the choice that came before, for the arrays."""
    if top is None or tokens is None:
        return None
    return _chat(tokens, top) if chat else _legacy(tokens, top, offset, None)


def echoed(prompt: Positions, opening: str, answer: list[wire.TokenLogprob], top: int) -> dict[str, Any]:
    """A prompt's arrays and the answer's behind them. `opening`: the text of the first token, which has no score."""
    return _legacy([*(token for token in prompt if token is not None), *answer], top, 0, opening)


def of_prompt(prompt: Positions, top: int) -> list[dict[str, Any] | None]:
    """VLLM's extension: an object by token id for every position, the prompt's own token first."""
    return [None if token is None else _position(token, top) for token in prompt]


def _position(token: wire.TokenLogprob, top: int) -> dict[str, Any]:
    entries = {str(token.token_id): _ranked(token.token, token.logprob, token.rank)}
    for rank, other in enumerate(token.top[:top], 1):
        entries.setdefault(str(other.token_id), _ranked(other.token, other.logprob, rank))
    return entries


def _ranked(token: str, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": max(logprob, FLOOR), "rank": rank, "decoded_token": token}


def width(tokens: list[wire.TokenLogprob] | None) -> int:
    """Characters by which these tokens move the offset of the next."""
    return sum(len(token.token) for token in tokens or ())


def _chat(tokens: list[wire.TokenLogprob], top: int) -> dict[str, Any]:
    return {
        "content": [
            {
                **_one(token.token, token.logprob),
                "top_logprobs": [_one(other.token, other.logprob) for other in token.top[:top]],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _one(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": max(logprob, FLOOR), "bytes": list(token.encode("utf-8", errors="replace"))}


def _legacy(tokens: list[wire.TokenLogprob], top: int, offset: int, opening: str | None) -> dict[str, Any]:
    shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    if opening is not None:
        _add(shown, opening, None, None, offset)
        offset += len(opening)
    for token in tokens:
        best = {other.token: max(other.logprob, FLOOR) for other in token.top[:top]}
        # The token itself is always among them, so there may be one more than was asked for.
        _add(shown, token.token, max(token.logprob, FLOOR), {token.token: max(token.logprob, FLOOR), **best}, offset)
        offset += len(token.token)
    return shown


def _add(
    shown: dict[str, list[Any]], token: str, logprob: float | None, best: dict[str, float] | None, offset: int
) -> None:
    for name, value in (
        ("tokens", token),
        ("token_logprobs", logprob),
        ("top_logprobs", best),
        ("text_offset", offset),
    ):
        shown[name].append(value)
