"""Text -> token ids, exactly as transformers and vLLM make them, without either.

A Hugging Face folder gives `tokenizer.json`, `tokenizer_config.json` and the chat template. Invariants: the template
runs in the sandbox that transformers uses; long texts are worked on in a thread, so that no stream stalls behind them.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from services.gateway.http.requests import ConversationMessage
from shared.errors import InvalidRequest, SettingsError
from shared.model_files import model_folder, read_json, read_tokenizer, vocabulary_size

T = TypeVar("T")

INLINE_CHARACTERS = 1000  # longer texts go to a thread: 100k characters inline stall every stream for 22-42 ms
INLINE_MESSAGES = 50
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


Fits = Callable[[int], object]  # of a prompt's length in tokens: raises where it is too long


def _any_length(_: int) -> None:
    pass


class ChatTokenizer:
    """A model's tokeniser and chat template. Create with `load`."""

    def __init__(
        self, tokenizer: Tokenizer, template: str | None, special_tokens: dict[str, str], vocabulary: int
    ) -> None:
        """Raises SettingsError for a template that does not compile."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        try:
            self._template = _compiled(template) if template else None
        except jinja2.TemplateError as error:
            raise SettingsError(f"setting 'model': its chat template does not compile: {error}") from error
        self.vocabulary = vocabulary
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)  # characters of a token

    @classmethod
    def load(cls, model: str, revision: str = "") -> "ChatTokenizer":
        """Raises SettingsError that says what is missing. `model` is a folder or a Hugging Face id."""
        folder = model_folder(model, revision)
        tokenizer = read_tokenizer(folder, model)
        config = read_json(folder / "tokenizer_config.json")
        special = {**read_json(folder / "special_tokens_map.json"), **config}
        names = {name: _token_text(special[name]) for name in SPECIAL_TOKENS if special.get(name)}
        return cls(tokenizer, _template_text(folder, config), names, vocabulary_size(folder, tokenizer))

    async def chat(self, messages: list[ConversationMessage], fits: Fits = _any_length) -> list[int]:
        """The prompt of a conversation. Raises InvalidRequest when the template refuses it, and what `fits` raises."""
        many = len(messages) > INLINE_MESSAGES
        size = INLINE_CHARACTERS + 1 if many else sum(len(message.text()) for message in messages)
        return await _aside(size, lambda: self._encode(self._render(messages), fits, special=False))

    async def text(self, text: str, fits: Fits = _any_length) -> list[int]:
        """Raises what `fits` raises."""
        return await _aside(len(text), lambda: self._encode(text, fits, special=True))

    async def shown(self, tokens: Sequence[int]) -> str:
        """The text of a prompt that came as ids, special tokens included, as vLLM echoes it."""
        return await _aside(len(tokens), lambda: self._decode(tokens))

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text

    def _encode(self, text: str, fits: Fits, *, special: bool) -> list[int]:
        """Counted before it becomes a list: that takes the interpreter 50 ms for a million tokens."""
        encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0]
        fits(len(encoded))
        ids: list[int] = encoded.ids
        return ids

    def _render(self, messages: list[ConversationMessage]) -> str:
        if self._template is None:
            raise InvalidRequest("messages: this model has no chat template; use /v1/completions", param="messages")
        conversation = [
            {"role": message.role, "content": message.text(), **({"name": message.name} if message.name else {})}
            for message in messages
        ]
        try:
            return self._template.render(
                messages=conversation, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            # Only a template's own raise_exception speaks to the client; anything else may quote the conversation.
            words = f": {error}" if isinstance(error, _TemplateRefusal) else ""
            raise InvalidRequest(f"messages: the chat template refuses them{words}", param="messages") from error


class _TemplateRefusal(jinja2.TemplateError):
    pass


async def _aside(size: int, work: Callable[[], T]) -> T:
    return work() if size <= INLINE_CHARACTERS else await asyncio.to_thread(work)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant says, for training; here it renders its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up (chat_template_utils.py)."""

    def raise_exception(message: str) -> None:
        raise _TemplateRefusal(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)  # noqa: DTZ005 - local time, as transformers has it

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _compiled(template: str) -> jinja2.Template:
    compiled = _environment().from_string(template)
    # Each rendering begins with a copy of them: of jinja2's own map of maps that takes 20 times as long.
    compiled.globals = dict(compiled.globals)
    return compiled


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _template_text(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own wins over the tokeniser's configuration, as in transformers."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text()
    found = read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):  # several named ones
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None
