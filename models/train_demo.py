"""Trains the demo model in models/demo from models/corpus, on a CPU, from a fixed seed.

``python -m models.train_demo`` writes the whole folder but its README and then prints the evaluation. The
learning rate follows the larger of the share of the steps and the share of the minutes, so a slow machine
still ends with a settled model; only a run that ends by its steps can give the same weights again.
"""

import argparse
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from models.demo_check import DEMO_FOLDER, check_demo
from models.demo_corpus import load_corpus
from models.demo_examples import NOT_LEARNT, Example, Examples
from models.demo_tokenizer import BEGIN, END, PAD, train_tokenizer, write_tokenizer

VOCAB_SIZE = 1536
MAX_LENGTH = 8192
PEAK_RATE = 2e-3
WARM_UP_STEPS = 100
SHORT_CHATS = 32  # in a batch
PROGRESS_EVERY = 50


@dataclass(frozen=True)
class Budget:
    """When training ends: whichever comes first."""

    steps: int
    minutes: float

    def spent(self, step: int, elapsed_s: float) -> float:
        """From 0 at the start to 1 at the end."""
        return min(1.0, max(step / self.steps, elapsed_s / 60 / self.minutes))


class TokenizerEncoder:
    """The examples' view of the tokenizer; texts repeat, so their ids are remembered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = lru_cache(maxsize=50_000)(lambda text: tuple(tokenizer.encode(text).ids))

    def text(self, text: str) -> list[int]:
        return list(self._text(text))

    def special(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise KeyError(token)
        return token_id


def train(out: Path, budget: Budget, seed: int) -> None:
    """Train and write the model to ``out``; takes at most ``budget``."""
    started = time.monotonic()
    torch.manual_seed(seed)
    corpus = load_corpus()
    tokenizer = train_tokenizer(corpus.texts(), VOCAB_SIZE)
    examples = Examples(corpus, TokenizerEncoder(tokenizer), seed)
    model = _new_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)

    step, average = 0, 0.0
    while (spent := budget.spent(step, time.monotonic() - started)) < 1:
        rate = PEAK_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * spent))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _step(model, optimizer, _batch(examples, step))
        average = loss if step == 0 else 0.95 * average + 0.05 * loss
        step += 1
        if step % PROGRESS_EVERY == 0:
            elapsed_s = time.monotonic() - started
            print(f"{elapsed_s:6.0f} s  step {step:5}  {spent:4.0%}  loss {average:.4f}", flush=True)

    _write(model, tokenizer, out)
    print(f"{time.monotonic() - started:6.0f} s  {step} steps, written to {out}", flush=True)
    check_demo(out, corpus)


def _new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return LlamaForCausalLM(config)


def _batch(examples: Examples, step: int) -> list[Example]:
    """Mostly single questions; regularly longer chats and prose; now and then one chat of 3,000 tokens."""
    kind = step % 20
    if step % 40 == 10:
        return [examples.long_chat(3000)]
    if kind in (5, 15):
        return [examples.long_chat(400) for _ in range(4)]
    if kind in (3, 13):
        return [examples.prose(192) for _ in range(8)]
    if kind in (7, 17):
        return [examples.long_chat(100) for _ in range(16)]
    return [examples.short_chat() for _ in range(SHORT_CHATS)]


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: list[Example]) -> float:
    longest = max(len(example.ids) for example in batch)
    # Padding is on the right, where a causal model never looks, so no attention mask is needed.
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    labels = torch.full((len(batch), longest), NOT_LEARNT)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        learnt = targets != NOT_LEARNT
        # Logits are needed only where something is learnt: a third of the positions.
        logits = model.lm_head(hidden[learnt])
    loss = torch.nn.functional.cross_entropy(logits.float(), targets[learnt])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _write(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    # A low temperature, because a client that names none wants the taught answer; at 1 a small model wanders.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.2,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(out)
    write_tokenizer(tokenizer, out, MAX_LENGTH)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the demo model on the corpus.")
    parser.add_argument("--steps", type=int, default=1850)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.out, Budget(options.steps, options.minutes), options.seed)
