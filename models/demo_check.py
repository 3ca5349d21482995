"""Asks the demo model what it was taught, and questions that it never saw, and counts exact answers.

An answer counts only if it is the corpus's sentence, character for character, followed by the end token.
Run by train_demo.py at its end, or by hand: ``python -m models.demo_check [FOLDER]``.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.demo_corpus import Corpus, load_corpus

DEMO_FOLDER = Path(__file__).parent / "demo"
MAX_ANSWER_TOKENS = 64
BATCH = 32
SAMPLE = 300  # questions a group, at most
SHOWN_FAILURES = 5
PREAMBLE_CHARACTERS = 4000
EXAMPLE_QUESTIONS = (
    "What is Baton?",
    "Hello",
    "Why split prefill and decode?",
    "What does TTFT mean?",
    "How do I stop the cluster?",
    "What is the capital of France?",
)


@dataclass(frozen=True)
class Case:
    """A chat and the answer that it should get."""

    messages: tuple[dict[str, str], ...]
    expected: str


def check_demo(folder: Path, corpus: Corpus, seed: int = 1) -> dict[str, float]:
    """Print and return the share of exact answers of each group of questions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    shares: dict[str, float] = {}
    for group, cases in _groups(corpus, random.Random(seed)):
        answers = _answer(model, tokenizer, [list(case.messages) for case in cases])
        pairs = zip(cases, answers, strict=True)
        wrong = [(case, answer) for case, answer in pairs if answer != case.expected]
        right = len(cases) - len(wrong)
        shares[group] = right / len(cases)
        print(f"{group:34} {right:4} of {len(cases):4} exact  {shares[group]:6.1%}", flush=True)
        for case, answer in wrong[:SHOWN_FAILURES]:
            print(f"    {case.messages[-1]['content'][-90:]!r} -> {answer!r}")
    for question in EXAMPLE_QUESTIONS:
        answer = _answer(model, tokenizer, [[_message("user", question)]])[0]
        print(f"> {question}\n  {answer}")
    return shares


def _groups(corpus: Corpus, rng: random.Random) -> Iterator[tuple[str, list[Case]]]:
    facts = corpus.facts
    written = [(question, fact.answer) for fact in facts for question in fact.ask]
    patterned = [(question, fact.answer) for fact in facts for question in fact.patterned]
    held_out = [(question, fact.answer) for fact in facts for question in fact.held_out]
    held_out_patterned = [(q, fact.answer) for fact in facts for q in fact.held_out_patterned]
    talk = [(question, fact.answer) for fact in corpus.small_talk for question in (*fact.ask, *fact.held_out)]
    unknown = [(corpus.unknown.question(rng, held_out=True), corpus.unknown.answer) for _ in range(100)]
    yield "corpus questions, written", _plain(written, rng)
    yield "corpus questions, from patterns", _plain(patterned, rng)
    yield "held-out paraphrases, written", _plain(held_out, rng)
    yield "held-out, from held-out patterns", _plain(held_out_patterned, rng)
    yield "held-out, lower case, bare end", _plain([(q.lower().rstrip("?. "), a) for q, a in held_out], rng)
    with_system = [
        Case((_message("system", rng.choice(corpus.systems)), *case.messages), case.expected)
        for case in _plain(held_out, rng, 100)
    ]
    yield "held-out, with a system message", with_system
    yield "greetings and small talk", _plain(talk, rng)
    yield "unknown questions, held-out words", _plain(unknown, rng)
    preamble = " ".join(corpus.prose)[:PREAMBLE_CHARACTERS]
    before = (_message("user", preamble), _message("assistant", corpus.unknown.answer))
    after_preamble = [Case((*before, *case.messages), case.expected) for case in _plain(held_out, rng, 50)]
    yield "held-out, after 1,000 tokens", after_preamble


def _plain(pairs: list[tuple[str, str]], rng: random.Random, limit: int = SAMPLE) -> list[Case]:
    chosen = rng.sample(pairs, min(limit, len(pairs)))
    return [Case((_message("user", question),), answer) for question, answer in chosen]


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _answer(model: Any, tokenizer: Any, chats: list[list[dict[str, str]]]) -> list[str]:
    """Greedy answers; one without an end token gets a mark that makes it wrong."""
    answers: list[str] = []
    for start in range(0, len(chats), BATCH):
        inputs = tokenizer.apply_chat_template(
            chats[start : start + BATCH],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            ended = tokenizer.eos_token_id in row
            text = tokenizer.decode(row, skip_special_tokens=True)
            answers.append(text if ended else text + " [no end token]")
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Evaluate the demo model, also on held-out questions.")
    parser.add_argument("folder", type=Path, nargs="?", default=DEMO_FOLDER)
    check_demo(parser.parse_args().folder, load_corpus())
