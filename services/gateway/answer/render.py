"""Output rows -> OpenAI's JSON, whole or as server-sent events.

Invariants: envelopes are built once a request and only text is encoded per delta; the events of one flush are one
piece of bytes; the first event of a chat carries the role, one event of each choice carries its finish reason.
"""

from collections.abc import Sequence
from typing import Any, Self

import msgspec

from services.gateway.answer import logprobs
from shared import wire
from shared.errors import BatonError

DONE = b"data: [DONE]\n\n"
WAITING = b": waiting\n\n"

encode = msgspec.json.Encoder().encode


class Row(msgspec.Struct, frozen=True, gc=False):
    """One delta of one choice, or a piece of the prompt's log probabilities."""

    choice: int  # of the client's request, over all its prompts
    text: str
    tokens: bytes  # packed ids
    finish: wire.Finish | None = None
    logprobs: list[wire.TokenLogprob] | None = None
    prompt_logprobs: list[wire.TokenLogprob | None] | None = None


class PromptShown(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer may show of a prompt."""

    tokens: list[int]
    echo: str | None = None  # its text, to be shown before each answer
    opening: str = ""  # the text of its first token


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer to one request looks like. Choices are numbered prompt by prompt."""

    chat: bool
    id: str
    created: int  # seconds since the epoch
    model: str
    n: int  # choices a prompt
    top_logprobs: int | None  # None: no logprobs
    prompt_logprobs: int | None
    include_usage: bool
    return_token_ids: bool
    service_tier: str | None  # echoed when it was asked for
    prompts: Sequence[PromptShown]
    prompt_only: bool  # no token was asked for: only the echo

    @property
    def choices(self) -> int:
        return self.n * len(self.prompts)

    def prompt_of(self, choice: int) -> PromptShown:
        return self.prompts[choice // self.n]

    def wanted(self, rows: list[Row]) -> list[Row]:
        """Without the token that an engine makes where none was asked for."""
        if not self.prompt_only:
            return rows
        return [
            msgspec.structs.replace(
                row,
                text="",
                tokens=b"",
                logprobs=None if row.logprobs is None else [],
                finish=row.finish and wire.Finish(reason="length"),
            )
            for row in rows
        ]

    def head(self, kind: str) -> dict[str, Any]:
        head: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        if self.service_tier is not None:
            head["service_tier"] = self.service_tier
        return head


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """In tokens; `cached`: prompt tokens that nobody computed for this request."""

    prompt: int
    completion: int
    cached: int

    @classmethod
    def total(cls, usages: Sequence[Self], *, answered: bool) -> Self:
        """Of all prompts; unless `answered`, the token that each engine made is nobody's."""
        return cls(
            prompt=sum(one.prompt for one in usages),
            completion=sum(one.completion for one in usages) if answered else 0,
            cached=sum(one.cached for one in usages),
        )

    def shown(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def error_body(error: BatonError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {
        "error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code},
    }


def event(value: Any) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def error_event(error: BatonError) -> bytes:
    return event(error_body(error))


class EventWriter:
    """The chunks of one streamed answer."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._kind = "chat.completion.chunk" if form.chat else "text_completion"
        self._offsets = [0] * form.choices  # characters sent, for the legacy logprobs
        self._scores: list[logprobs.Positions] = [[] for _ in form.prompts]  # until every choice has shown them
        self._silent = {choice for choice in range(form.choices) if form.prompt_of(choice).echo is not None}
        self._started = False
        self._is_full = form.return_token_ids or form.top_logprobs is not None
        self._prompt_shown = [not form.return_token_ids] * form.choices
        # From the first flush on, a row that has only text is `before` its choice, the text, and `after`.
        self.is_plain = False
        opening = b"data: " + encode(form.head(self._kind))[:-1] + b',"choices":[{"index":'
        text = b',"delta":{"content":' if form.chat else b',"text":'
        self.before = [opening + str(choice).encode() + text for choice in range(form.choices)]
        closing = b"}" if form.chat else b""
        usage = b',"usage":null' if form.include_usage else b""
        self.after = closing + b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"

    def rows(self, rows: list[Row]) -> bytes:
        """All events of one flush. Deltas without anything to show (half a character held back) are left out."""
        parts: list[bytes] = []
        if not self._started:
            self._started = True
            parts.append(self._first())
        for row in self._form.wanted(rows):
            if row.prompt_logprobs is not None:
                self._scores[row.choice // self._form.n].extend(row.prompt_logprobs)
                continue
            if row.choice in self._silent:
                parts.append(self._echo(row.choice))
            if row.finish is None and not self._is_full:
                if row.text:
                    parts.append(self.before[row.choice] + encode(row.text) + self.after)
            else:
                parts.append(self._full(row))
        self.is_plain = not (self._is_full or self._silent or self._form.prompt_only)
        return b"".join(parts)

    def usage(self, usage: Usage) -> bytes:
        """The chunk that `stream_options.include_usage` adds."""
        if not self._form.include_usage:
            return b""
        return event({**self._form.head(self._kind), "choices": [], "usage": usage.shown()})

    def _first(self) -> bytes:
        """The role of every choice, and the prompt's ids where they are wanted."""
        if not self._form.chat:
            return b""
        return b"".join(
            self._event(
                {
                    "index": choice,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                },
                {"prompt_token_ids": list(self._form.prompts[0].tokens)}
                if self._form.return_token_ids and choice == 0
                else {},
            )
            for choice in range(self._form.choices)
        )

    def _echo(self, index: int) -> bytes:
        """The prompt, before the first piece of its answer."""
        self._silent.remove(index)
        prompt, top = self._form.prompt_of(index), self._form.top_logprobs
        choice: dict[str, Any] = {"index": index, "text": prompt.echo, "logprobs": None, "finish_reason": None}
        if top is not None:
            scores = self._scores[index // self._form.n]
            choice["logprobs"] = logprobs.echoed(scores, prompt.opening, [], top)
            self._offsets[index] = len(prompt.opening) + sum(len(token.token) for token in scores if token)
        return self._event(choice, {})

    def _full(self, row: Row) -> bytes:
        form = self._form
        choice: dict[str, Any] = {"index": row.choice}
        if form.chat:
            choice["delta"] = {"content": row.text} if row.text else {}
        else:
            choice["text"] = row.text
        choice["logprobs"] = logprobs.render(form.chat, row.logprobs, form.top_logprobs, self._offsets[row.choice])
        choice["finish_reason"] = row.finish.reason if row.finish else None
        if row.finish and row.finish.stop_reason is not None:
            choice["stop_reason"] = row.finish.stop_reason
        if form.return_token_ids:
            choice["token_ids"] = wire.unpack_tokens(row.tokens)
            if not form.chat and not self._prompt_shown[row.choice]:
                self._prompt_shown[row.choice] = True
                choice["prompt_token_ids"] = list(form.prompt_of(row.choice).tokens)
        self._offsets[row.choice] += logprobs.width(row.logprobs)
        return self._event(choice, {})

    def _event(self, choice: dict[str, Any], extra: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self._form.include_usage else {}
        return event({**self._form.head(self._kind), **extra, "choices": [choice], **usage})


class _Collected(msgspec.Struct):
    """Of one choice."""

    texts: list[str] = []
    tokens: list[int] = []
    logprobs: list[wire.TokenLogprob] = []
    finish: wire.Finish | None = None


class Collector:
    """The rows of one answer that is not streamed."""

    is_plain = False

    def __init__(self, form: Form) -> None:
        self._form = form
        self._choices = [_Collected() for _ in range(form.choices)]
        self._scores: list[logprobs.Positions] = [[] for _ in form.prompts]

    def rows(self, rows: list[Row]) -> bytes:
        """Nothing is to be sent before the end."""
        for row in self._form.wanted(rows):
            if row.prompt_logprobs is not None:
                self._scores[row.choice // self._form.n].extend(row.prompt_logprobs)
                continue
            choice = self._choices[row.choice]
            choice.texts.append(row.text)
            if self._form.return_token_ids:
                choice.tokens.extend(wire.unpack_tokens(row.tokens))
            if row.logprobs:
                choice.logprobs.extend(row.logprobs)
            if row.finish is not None:
                choice.finish = row.finish
        return b""

    def body(self, usage: Usage) -> bytes:
        form = self._form
        answer = form.head("chat.completion" if form.chat else "text_completion")
        answer["choices"] = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        answer["usage"] = usage.shown()
        if form.chat and form.return_token_ids:
            answer["prompt_token_ids"] = list(form.prompts[0].tokens)
        if form.chat and form.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.of_prompt(self._scores[0], form.prompt_logprobs)
        return encode(answer)

    def _choice(self, index: int, choice: _Collected) -> dict[str, Any]:
        form, prompt, scores = self._form, self._form.prompt_of(index), self._scores[index // self._form.n]
        text = "".join(choice.texts)
        shown: dict[str, Any] = {"index": index}
        if form.chat:
            shown["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            shown["text"] = (prompt.echo or "") + text
        if prompt.echo is not None and form.top_logprobs is not None:
            shown["logprobs"] = logprobs.echoed(scores, prompt.opening, choice.logprobs, form.top_logprobs)
        else:
            shown["logprobs"] = logprobs.render(form.chat, choice.logprobs, form.top_logprobs, 0)
        shown["finish_reason"] = choice.finish.reason if choice.finish else None
        if choice.finish and choice.finish.stop_reason is not None:
            shown["stop_reason"] = choice.finish.stop_reason
        if form.return_token_ids:
            shown["token_ids"] = choice.tokens
            if not form.chat:
                shown["prompt_token_ids"] = list(prompt.tokens)
        if not form.chat and form.prompt_logprobs is not None:
            shown["prompt_logprobs"] = logprobs.of_prompt(scores, form.prompt_logprobs)
        return shown
