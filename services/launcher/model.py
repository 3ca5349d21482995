"""What the launcher must know of a model before it starts engines: where it lies and how much room it needs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from services.launcher.refusal import UserError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_WEIGHTS = (("*.safetensors",), ("*.bin", "*.pt"))
_TEXTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
WIDEST_VALUE_BYTES = 4  # float32: the worst case for a KV value


class Model(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    name: str  # the folder's name, or the Hugging Face id
    weights_bytes: int
    kv_values_per_token: int  # over all layers; times the bytes of a value
    max_len: int  # tokens; 0: config.json does not say

    def kv_bytes(self, tokens: int, value_bytes: int = WIDEST_VALUE_BYTES) -> int:
        return tokens * self.kv_values_per_token * value_bytes


def read_model(model: str, revision: str = "", *, with_weights: bool = True) -> Model:
    """Look at a folder, or fetch a Hugging Face id into the local cache. Refuses what no engine could load."""
    folder = Path(model).expanduser()
    name = folder.resolve().name
    if not folder.is_dir():
        if not _HUB_ID.match(model):
            raise UserError(
                f"there is no model folder {model}: give --model a folder with a config.json, or an ORG/NAME"
            )
        folder, name = _fetch(model, revision, _WEIGHTS if with_weights else ()), model
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} has no config.json: --model must be a Hugging Face model folder")
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{config_file} cannot be read: {error}") from error
    text = config.get("text_config") or config
    return Model(
        path=str(folder.resolve()),
        name=name,
        weights_bytes=_weights_bytes(folder),
        kv_values_per_token=_kv_values_per_token(text),
        max_len=next((int(text[key]) for key in _LENGTH_KEYS if text.get(key)), 0),
    )


def _kv_values_per_token(config: dict[str, Any]) -> int:
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    if rank := config.get("kv_lora_rank"):  # latent attention keeps one compressed vector and the rotary part
        return int(layers * (rank + config.get("qk_rope_head_dim", 0)))
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or (config.get("hidden_size") or config.get("n_embd") or 0) // heads
    return int(2 * layers * kv_heads * head_size)


def _weights_bytes(folder: Path) -> int:
    for patterns in _WEIGHTS:
        if files := [file for pattern in patterns for file in folder.glob(pattern)]:
            return sum(file.stat().st_size for file in files)
    return 0


def _fetch(model: str, revision: str, weights: Sequence[tuple[str, ...]]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_TEXTS]
    try:
        for patterns in weights or ((),):
            wanted.extend(patterns)
            folder = Path(snapshot_download(model, revision=revision or None, allow_patterns=wanted))
            if _weights_bytes(folder):
                break
    except Exception as error:  # the hub has many ways to fail, and one answer here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"there is no folder {model}, and Hugging Face did not give it: {reason}") from error
    return folder
