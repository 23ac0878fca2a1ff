"""Second subject of the learning study: 64 made-up operators, and solutions that cannot be right for a wrong reason.

`3 zap 7 dax 2?` is worked from left to right, as in `learning_subject`. A line names the reading of its operator
(`3 zap from 7 4`), and the verifier compares whole solutions, so that a wrong reading never passes by luck.
`wide_training.py` makes the start model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from learning_subject import READINGS, SPLITS, dataset

if TYPE_CHECKING:
    import datasets

MODEL = Path(__file__).resolve().parent / "wide_model"
"""The start model, its tokenizer and its prompts."""
SEED = 64
OPERATORS = tuple(
    (
        "bam bex bif bok bul cav cep cid cog cux dax dep dib dof dun fam feb fip fol fuz gab gem gif gop guv hax "
        "hep hib hok hud jav jeb jid jom jux kal kef kim kov kun lam lef lip loz lud mab meg mip mov muz nax nef "
        "nib nog nul pav pek pif pog pux rav rez rik rom"
    ).split()
)
KNOWN = (0.85, 0.6, 0.3)
"""Probability with which the start model reads an operator rightly, for a third of the operators each, +-0.05."""
REGIMES = {"wide-plenty": (1, 2, 3), "wide-starved": (5, 6)}
"""Operators per question."""
LONGER = {"wide-plenty": (4,), "wide-starved": (7,)}
"""Operators of the `longer` questions, which no run is trained on."""
_RULE = re.compile(r"I write (\w+) (\w+)\.")


@dataclass(frozen=True, slots=True)
class Question:
    """Digits and the operators between them."""

    numbers: tuple[int, ...]
    operators: tuple[str, ...]

    @property
    def text(self) -> str:
        pairs = zip(self.operators, self.numbers[1:], strict=True)
        return str(self.numbers[0]) + "".join(f" {operator} {number}" for operator, number in pairs) + "?"

    def lines(self, readings: Sequence[str]) -> list[str]:
        """Return the lines of a solution with these readings, the last one `Answer: n`."""
        total, lines = self.numbers[0], []
        for operator, number, reading in zip(self.operators, self.numbers[1:], readings, strict=True):
            new = READINGS[reading](total, number)
            lines.append(f"{total} {operator} {reading} {number} {new}")
            total = new
        return [*lines, f"Answer: {total}"]

    @property
    def answer(self) -> str:
        """The right solution in one line, for `strict`."""
        return true_solution(self.text).replace("\n", "; ")


def parse(text: str) -> Question:
    """Return the question that a text asks."""
    return Question(tuple(int(each) for each in re.findall(r"\d", text)), tuple(re.findall("[a-z]+", text)))


def rule(operator: str, reading: str) -> str:
    return f"If I see {operator}, I write {operator} {reading}."


def notes_of(rules: Sequence[str]) -> str:
    """Return rules as the bank's notes have them."""
    return "\n".join(["## Heuristics", *(f"- {each}" for each in rules)])


def true_rules(question: str, count: int | None = None) -> str:
    """Return the true rules of a question's first operators, or of all, as the bank's notes have them."""
    return notes_of([rule(operator, truth()[operator]) for operator in parse(question).operators[:count]])


def true_solution(question: str) -> str:
    """Return the right solution of a question."""
    asked = parse(question)
    return "\n".join(asked.lines([truth()[operator] for operator in asked.operators]))


def rules_in(text: str) -> list[tuple[str, str]]:
    """Return (operator, reading) of every rule in a text."""
    return _RULE.findall(text)


def strict(completion: str, answer: str) -> bool:
    """Judge a solution by all of its lines."""
    return "; ".join(completion.strip().split("\n")) == answer


@lru_cache(maxsize=1)
def mix() -> dict[str, dict[str, float]]:
    """Return the start model's probability of three readings by operator; the first one is right."""
    rng, found = random.Random(SEED), {}
    for number, operator in enumerate(OPERATORS):
        right, often, rarely = rng.sample(list(READINGS), 3)
        known, share = KNOWN[number % 3] + rng.uniform(-0.05, 0.05), rng.uniform(0.65, 0.95)
        found[operator] = {right: known, often: (1 - known) * share, rarely: (1 - known) * (1 - share)}
    return found


@lru_cache(maxsize=1)
def truth() -> dict[str, str]:
    """Return the right reading of every operator."""
    return {operator: next(iter(readings)) for operator, readings in mix().items()}


def draw(rng: random.Random, length: int) -> Question:
    """Draw a question with `length` operators."""
    return Question(tuple(rng.randint(0, 9) for _ in range(length + 1)), tuple(rng.sample(OPERATORS, length)))


@lru_cache(maxsize=16)
def questions(regime: str, split: str) -> tuple[tuple[str, str], ...]:
    """Return (question, answer) of a regime and split. Held-out questions are in no training split."""
    lengths = (LONGER if split == "longer" else REGIMES)[regime]
    rng, rows = random.Random(f"{SEED} {regime} {split}"), dict[str, str]()
    earlier = {"train": ("test", "tune", "longer"), "tune": ("test",)}.get(split, ())
    taken = {text for each in earlier for text, _ in questions(regime, each)}
    while len(rows) < SPLITS[split]:
        question = draw(rng, rng.choice(lengths))
        if question.text not in taken:
            rows[question.text] = question.answer
    return tuple(rows.items())


def tasks(regime: str, split: str) -> datasets.Dataset:
    """Return the tasks with the columns `prompt` (a conversation) and `answer` (for `strict`)."""
    return dataset(questions(regime, split))
