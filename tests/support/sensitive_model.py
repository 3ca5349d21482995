"""Writes a tiny Llama with random weights whose output depends on every KV block of its prompt.

A random model with usual settings often repeats one token, and a trained one may look at its last few tokens
only; an equality test over either passes whatever the KV holds. The sizes and scales below were measured to
be sensitive to the first block alone and to the last block alone. Invariants:

- one ASCII character is one token, its id is its byte: N characters of prompt are exactly N tokens;
- encoding text adds no special token;
- the same seed gives the same bytes.

``python -m tests.support.sensitive_model FOLDER`` writes one by hand.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

HIDDEN = 256
LAYERS = 4
HEADS = 4
KV_HEADS = 2
HEAD_SIZE = 64
MLP_SIZE = 1024
INIT_RANGE = 0.08
ATTENTION_GAIN = 3.0  # makes what attention reads outweigh the residual stream of the last token
# Attention that is too even averages a long prompt away: without this gain, zeroing one block of 1,000 tokens
# often left 32 greedy tokens unchanged. With it, zeroing the first, a middle or the last block of 33 to 1,900
# tokens changed the text within 22 tokens, for three seeds.
QUERY_GAIN = 3.0

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (BOS, EOS, PAD, *ROLE_MARKERS)  # ids 256, 257, ... in this order
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
PRINTABLE = range(0x20, 0x7F)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] or '') + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_sensitive_model(folder: Path, seed: int = 0, max_model_len: int = 2048) -> Path:
    """Write a complete Hugging Face folder (about 16 MB, float32) and return its path; needs no network.

    ``folder`` is created if missing. Load it with ``dtype="float32"``: vLLM would otherwise choose bfloat16,
    in which equal requests may round differently in different batches. Under a JSON grammar give the engine
    ``structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True}``: a random model may
    otherwise write blanks for ever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder, max_model_len)
    _write_json(folder / "config.json", _config(max_model_len))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": _special_id(BOS),
            "eos_token_id": _special_id(EOS),
            "pad_token_id": _special_id(PAD),
        },
    )
    save_file(dict(_weights(seed)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _special_id(token: str) -> int:
    return 256 + SPECIAL_TOKENS.index(token)


def _config(max_model_len: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "initializer_range": INIT_RANGE,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": _special_id(BOS),
        "eos_token_id": _special_id(EOS),
        "pad_token_id": _special_id(PAD),
    }


def _weights(seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the model by its Hugging Face name, in a fixed order from one generator."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * INIT_RANGE

    yield "model.embed_tokens.weight", normal(VOCAB_SIZE, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        yield f"{name}.self_attn.q_proj.weight", normal(HEADS * HEAD_SIZE, HIDDEN) * QUERY_GAIN
        yield f"{name}.self_attn.k_proj.weight", normal(KV_HEADS * HEAD_SIZE, HIDDEN)
        yield f"{name}.self_attn.v_proj.weight", normal(KV_HEADS * HEAD_SIZE, HIDDEN)
        yield f"{name}.self_attn.o_proj.weight", normal(HIDDEN, HEADS * HEAD_SIZE) * ATTENTION_GAIN
        yield f"{name}.mlp.gate_proj.weight", normal(MLP_SIZE, HIDDEN)
        yield f"{name}.mlp.up_proj.weight", normal(MLP_SIZE, HIDDEN)
        yield f"{name}.mlp.down_proj.weight", normal(HIDDEN, MLP_SIZE)
        yield f"{name}.input_layernorm.weight", torch.ones(HIDDEN)
        yield f"{name}.post_attention_layernorm.weight", torch.ones(HIDDEN)
    yield "model.norm.weight", torch.ones(HIDDEN)

    # All but printable ASCII gets the constant logit 0, below the best of 95 random ones: greedy text is
    # printable, one character a token, and never ends early, so comparing texts compares tokens.
    head = normal(VOCAB_SIZE, HIDDEN)
    silent = torch.ones(VOCAB_SIZE, dtype=torch.bool)
    silent[PRINTABLE.start : PRINTABLE.stop] = False
    head[silent] = 0.0
    yield "lm_head.weight", head


def _write_tokenizer(folder: Path, max_model_len: int) -> None:
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_model_len,
        },
    )


def _byte_characters() -> list[str]:
    """The character that stands for each byte 0..255 in a byte-level vocabulary (GPT-2's table).

    Printable bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    themselves = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters: list[str] = []
    moved = 0
    for byte in range(256):
        if byte in themselves:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + moved))
            moved += 1
    return characters


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a random Llama that is sensitive to every KV block.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=2048)
    options = parser.parse_args()
    print(make_sensitive_model(options.folder, options.seed, options.max_model_len))
