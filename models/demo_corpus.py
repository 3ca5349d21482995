"""Reads models/corpus and turns it into questions with their expected answers.

Invariants: a question has one answer, whatever fact it comes from; what is held out is never given to
training.
"""

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CORPUS_FOLDER = Path(__file__).parent / "corpus"
UNKNOWN_HELD_OUT_EVERY = 3
PLAIN_SHARE = 0.15  # of the unknown questions come from the list as they stand
INVENTED_SHARE = 0.25  # of the others are about an invented word


@dataclass(frozen=True)
class Fact:
    """One answer and the ways to ask for it."""

    answer: str
    ask: tuple[str, ...]  # written for this fact
    patterned: tuple[str, ...]  # made from patterns.yaml
    held_out: tuple[str, ...]  # written for this fact, evaluation only
    held_out_patterned: tuple[str, ...] = ()  # evaluation only


@dataclass(frozen=True)
class Unknown:
    """Questions to decline: patterns with {noun}, {verb}, {name}, {number}, and what fills them."""

    answer: str
    patterns: tuple[str, ...]
    plain: tuple[str, ...]
    fillings: dict[str, tuple[str, ...]]
    held_out_fillings: dict[str, tuple[str, ...]]

    def question(self, rng: random.Random, *, held_out: bool = False) -> str:
        """Make one question; held-out ones use only words that training never sees in a question."""
        if not held_out and rng.random() < PLAIN_SHARE:
            return rng.choice(self.plain)
        words: Mapping[str, tuple[str, ...]] = self.held_out_fillings if held_out else self.fillings
        if not held_out and rng.random() < INVENTED_SHARE:
            # Words of no language teach that an unfamiliar word is the sign of an unknown question.
            words = {kind: (_invented_word(rng),) for kind in ("noun", "verb", "name")} | {"number": ("7",)}
        return _fill(rng.choice(self.patterns), words, rng)


@dataclass(frozen=True)
class Corpus:
    """Everything the demo model is trained on."""

    facts: tuple[Fact, ...]
    small_talk: tuple[Fact, ...]
    unknown: Unknown
    prose: tuple[str, ...]  # paragraphs
    around: tuple[str, ...]  # patterns that go around a question
    systems: tuple[str, ...]  # system messages

    def texts(self) -> Iterator[str]:
        """Every text, for the tokenizer's training; frequent phrasings come often, as they will in use."""
        for fact in (*self.facts, *self.small_talk):
            yield from (fact.answer, *fact.ask, *fact.patterned)
        yield from self.prose
        yield from self.around
        yield from self.systems
        yield self.unknown.answer
        yield from (*self.unknown.patterns, *self.unknown.plain)
        for words in self.unknown.fillings.values():
            yield from words


def load_corpus(folder: Path = CORPUS_FOLDER) -> Corpus:
    """Read the corpus; raises ValueError where one question has two answers."""
    patterns = _read(folder / "patterns.yaml")
    facts = tuple(_facts(_read(folder / "facts.yaml"), patterns))
    small_talk = tuple(_facts(_read(folder / "small_talk.yaml"), patterns))
    _refuse_contradictions((*facts, *small_talk))
    prose = (folder / "prose.md").read_text(encoding="utf-8")
    return Corpus(
        facts=facts,
        small_talk=small_talk,
        unknown=_unknown(_read(folder / "unknown.yaml")),
        prose=tuple(paragraph.strip() for paragraph in prose.split("\n\n") if paragraph.strip()),
        around=tuple(patterns["around"]),
        systems=tuple(patterns["systems"]),
    )


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _facts(entries: list[dict[str, Any]], patterns: dict[str, Any]) -> Iterator[Fact]:
    for entry in entries:
        patterned: list[str] = []
        unseen: list[str] = []
        for kind in ("is", "to", "command"):
            phrases = entry.get(kind, [])
            patterned += [pattern.format(x=x) for x in phrases for pattern in patterns[kind]["ask"]]
            unseen += [pattern.format(x=x) for x in phrases[:2] for pattern in patterns[kind]["held_out"]]
        ask = tuple(entry.get("ask", []))
        known = {normal_form(question) for question in (*ask, *patterned)}
        yield Fact(
            answer=entry["answer"],
            ask=ask,
            patterned=tuple(dict.fromkeys(patterned)),
            held_out=tuple(q for q in entry.get("held_out", []) if normal_form(q) not in known),
            held_out_patterned=tuple(q for q in dict.fromkeys(unseen) if normal_form(q) not in known),
        )


def normal_form(question: str) -> str:
    """The question without what augmentation changes: case and the punctuation at its end."""
    return question.lower().strip(" .!?")


def _refuse_contradictions(facts: tuple[Fact, ...]) -> None:
    answers: dict[str, str] = {}
    for fact in facts:
        for question in (*fact.ask, *fact.patterned, *fact.held_out, *fact.held_out_patterned):
            other = answers.setdefault(normal_form(question), fact.answer)
            if other != fact.answer:
                raise ValueError(f"{question!r} has two answers: {other!r} and {fact.answer!r}")


def _unknown(entry: dict[str, Any]) -> Unknown:
    words = {kind: entry[f"{kind}s"] for kind in ("noun", "verb", "name")}
    train: dict[str, tuple[str, ...]] = {"number": tuple(str(n) for n in range(100))}
    held_out = dict(train)
    for kind, entries in words.items():
        train[kind] = tuple(word for i, word in enumerate(entries) if i % UNKNOWN_HELD_OUT_EVERY)
        held_out[kind] = tuple(word for i, word in enumerate(entries) if i % UNKNOWN_HELD_OUT_EVERY == 0)
    return Unknown(entry["answer"], tuple(entry["patterns"]), tuple(entry["plain"]), train, held_out)


def _invented_word(rng: random.Random) -> str:
    syllables = (rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    word = "".join(syllables) + rng.choice("bdgklmnprstx")
    return word.capitalize() if rng.random() < 0.3 else word


def _fill(pattern: str, words: Mapping[str, tuple[str, ...]], rng: random.Random) -> str:
    for kind, choices in words.items():
        while f"{{{kind}}}" in pattern:
            pattern = pattern.replace(f"{{{kind}}}", rng.choice(choices), 1)
    # "What is a a banana?" comes from a pattern with an article of its own.
    return re.sub(r"\b(?:an?|the|best) (an?|the) ", r"\1 ", pattern)
