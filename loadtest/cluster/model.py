"""A random Llama whose KV cache has a chosen size: what it says is noise, what it costs is real."""

import argparse
import shutil
from pathlib import Path

TOKENIZER = Path(__file__).parents[2] / "models" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--max-len", type=int, default=4096)


def run(args: argparse.Namespace) -> int:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        vocab_size=max(len(tokenizer), 512),
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.kv_heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_size,
        max_position_embeddings=args.max_len,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(args.out)
    for name in TOKENIZER_FILES:
        if (TOKENIZER / name).exists():
            shutil.copy(TOKENIZER / name, args.out / name)
    per_token = 2 * args.layers * args.kv_heads * args.head_size * 2
    print(f"{args.out}: {per_token / 1024:g} KiB of bfloat16 KV a token, {per_token * 1024 / 2**20:g} MiB for 1,024")
    return 0
