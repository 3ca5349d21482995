"""Makes training examples: chats whose answers are learnt, and prose that is learnt whole.

An example is a pair of equal-length lists, token ids and labels; a label of -100 is not learnt. The source of
chance is one ``random.Random``, so a seed fixes the whole sequence of examples.
"""

import random
from dataclasses import dataclass, field
from typing import Protocol

from models.demo_corpus import Corpus, Fact
from models.demo_tokenizer import ASSISTANT, END, SYSTEM, USER

NOT_LEARNT = -100

UNKNOWN_SHARE = 0.2
SMALL_TALK_SHARE = 0.08
FIRST_FACT_SHARE = 0.03  # "What is Baton?" is asked first by everybody
PASTED_SHARE = 0.2  # of the turns of a long chat have other text before the question
PATTERNED_SHARE = 0.4  # for facts that have both, how often a patterned question is taken


class Encoder(Protocol):
    """Turns text into token ids, without special tokens; ``special`` gives the id of one."""

    def text(self, text: str) -> list[int]: ...

    def special(self, token: str) -> int: ...


@dataclass
class Example:
    """Token ids and their labels, of equal length."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: list[int], *, learnt: bool) -> None:
        self.ids += ids
        self.labels += ids if learnt else [NOT_LEARNT] * len(ids)


class Examples:
    """An endless source of examples."""

    def __init__(self, corpus: Corpus, encoder: Encoder, seed: int) -> None:
        self._corpus = corpus
        self._encoder = encoder
        self._rng = random.Random(seed)

    def short_chat(self) -> Example:
        """One question, with or without a system message."""
        example = Example()
        self._maybe_system(example)
        self._turn(example)
        return example

    def long_chat(self, length: int) -> Example:
        """A preamble of any length, then turns until ``length`` tokens.

        It teaches that what is far away does not disturb the answer.
        """
        example = Example()
        preamble_tokens = self._rng.randrange(length)
        if self._rng.random() < 0.5:
            self._message(example, SYSTEM, self._filler(preamble_tokens))
            self._turn(example)
        else:
            self._maybe_system(example)
            self._turn(example, before=self._filler(preamble_tokens) + "\n\n")
        while len(example.ids) < length:
            pasted = self._rng.random() < PASTED_SHARE
            self._turn(example, self._filler(self._rng.randrange(60)) + "\n\n" if pasted else "")
        return example

    def prose(self, length: int) -> Example:
        """Running text from the start of a sentence, for completions without a chat template."""
        example = Example()
        paragraphs = self._rng.sample(self._corpus.prose, len(self._corpus.prose))
        sentences = paragraphs[0].split(". ")
        first = ". ".join(sentences[self._rng.randrange(len(sentences)) :])
        for paragraph in (first, *paragraphs[1:]):
            ids = self._encoder.text(paragraph)
            example.add([*ids, self._encoder.special(END)], learnt=True)
            if len(example.ids) >= length:
                break
        example.ids, example.labels = example.ids[:length], example.labels[:length]
        return example

    def _turn(self, example: Example, before: str = "") -> None:
        question, answer = self._question()
        self._message(example, USER, before + self._vary(question))
        example.add([self._encoder.special(ASSISTANT)], learnt=False)
        example.add([*self._encoder.text(answer), self._encoder.special(END)], learnt=True)

    def _message(self, example: Example, role: str, text: str) -> None:
        ids = [self._encoder.special(role), *self._encoder.text(text.strip()), self._encoder.special(END)]
        example.add(ids, learnt=False)

    def _maybe_system(self, example: Example) -> None:
        if self._rng.random() < 0.4:
            self._message(example, SYSTEM, self._rng.choice(self._corpus.systems))

    def _question(self) -> tuple[str, str]:
        kind = self._rng.random()
        if kind < UNKNOWN_SHARE:
            return self._corpus.unknown.question(self._rng), self._corpus.unknown.answer
        if kind < UNKNOWN_SHARE + SMALL_TALK_SHARE:
            fact = self._rng.choice(self._corpus.small_talk)
        elif kind < UNKNOWN_SHARE + SMALL_TALK_SHARE + FIRST_FACT_SHARE:
            fact = self._corpus.facts[0]
        else:
            fact = self._rng.choice(self._corpus.facts)
        return self._ask(fact), fact.answer

    def _ask(self, fact: Fact) -> str:
        if fact.patterned and (not fact.ask or self._rng.random() < PATTERNED_SHARE):
            return self._rng.choice(fact.patterned)
        return self._rng.choice(fact.ask)

    def _vary(self, question: str) -> str:
        """Another case, another punctuation, words around it, or one slip of the keyboard."""
        rng = self._rng
        if rng.random() < 0.2:
            question = rng.choice(self._corpus.around).format(q=question)
        if rng.random() < 0.3:
            question = question.rstrip("?.! ") + rng.choice(("", "", "?", ".", "!", " ?", "??"))
        case = rng.random()
        if case < 0.25:
            question = question.lower()
        elif case < 0.27:
            question = question.upper()
        if len(question) > 8 and rng.random() < 0.1:
            question = self._slip(question)
        return question

    def _slip(self, question: str) -> str:
        at = self._rng.randrange(len(question) - 1)
        if self._rng.random() < 0.5:
            return question[:at] + question[at + 1 :]
        return question[:at] + question[at + 1] + question[at] + question[at + 2 :]

    def _filler(self, tokens: int) -> str:
        """Sentences of the corpus in any order, about ``tokens`` long."""
        pieces: list[str] = []
        length = 0
        while length < tokens:
            pick = self._rng.random()
            if pick < 0.3:
                piece = self._rng.choice(self._corpus.prose)
            elif pick < 0.6:
                piece = self._rng.choice(self._rng.choice(self._corpus.prose).split(". "))
            elif pick < 0.8:
                piece = self._rng.choice(self._corpus.facts).answer
            else:
                piece = self._corpus.unknown.question(self._rng)
            pieces.append(piece)
            length += len(piece) // 4 + 1
        return " ".join(pieces)
