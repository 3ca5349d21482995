"""A model's folder, as far as it needs no weights: where it lies, its tokeniser and its vocabulary."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer

from shared.errors import SettingsError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.*", "config.json")


def model_folder(model: str, revision: str = "") -> Path:
    """A folder as it is; of a Hugging Face id, the small files are fetched. Raises SettingsError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.startswith((".", "/", "~")):
        raise SettingsError(f"setting 'model': there is no folder {model}")
    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as error:  # network, authorisation, name: the user needs one line in every case
        raise SettingsError(
            f"setting 'model': {model} is no folder here and cannot be fetched: {type(error).__name__}"
        ) from error


def read_tokenizer(folder: Path, model: str) -> Tokenizer:
    """Raises SettingsError that says what is missing."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SettingsError(f"setting 'model': {model} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise SettingsError(f"setting 'model': {path} cannot be read: {error}") from error


def vocabulary_size(folder: Path, tokenizer: Tokenizer) -> int:
    """Ids below it are tokens; a model's embedding may be padded beyond its tokeniser."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")  # multimodal models keep it with their text part
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else 0)
    return max(size if isinstance(size, int) else 0, tokenizer.get_vocab_size(with_added_tokens=True))


def read_json(path: Path) -> dict[str, Any]:
    """A mapping; empty where there is no such file. Raises SettingsError for one that cannot be read."""
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"setting 'model': {path} cannot be read: {error}") from error
    return loaded if isinstance(loaded, dict) else {}
