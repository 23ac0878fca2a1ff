"""Subject of the learning study: chains of made-up operators that a small model half knows, and lessons it can use.

`3 zap 7 dax 2?` is worked from left to right. Every operator has one right reading. A solution names the reading of
each line (`3 zap 7 from 4`) and ends with `Answer: 4`. `tasks` gives the questions of the two regimes, `strict` judges
the answers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

MODEL = Path(__file__).resolve().parent / "learning_model"
"""The start model, its tokenizer and its prompts."""
SEED = 7
OPERATORS = tuple(
    "zap mib dax lor fep gud hiv jol kem nuf pid qua rog sut tev vun wix yab zor bli cra dru fle glo".split()
)
READINGS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: (a + b) % 10, "take": lambda a, b: (a - b) % 10, "from": lambda a, b: (b - a) % 10,
    "larger": max, "smaller": min,
}  # fmt: skip
REGIMES = {"plenty": (2, 3), "starved": (5, 6)}
"""Operators per question."""
LONGER = {"plenty": (4,), "starved": (7,)}
"""Operators of the `longer` questions, which no run is trained on."""
SPLITS = {"test": 150, "longer": 100, "tune": 150, "train": 3000}
_RULE = re.compile(r"If I see (\w+), then (\w+) is (\w+)\.")


@lru_cache(maxsize=1)
def truth() -> dict[str, str]:
    """Return the right reading of every operator."""
    rng, found = random.Random(SEED), {}
    for operator in OPERATORS:
        found[operator] = rng.sample(list(READINGS), 3)[0]
        rng.uniform(-0.05, 0.05)
        rng.uniform(0.65, 0.95)
    return found


def solution(numbers: Sequence[int], operators: Sequence[str], readings: Sequence[str]) -> str:
    """Return the lines of a solution with these readings and `Answer: n`."""
    total, lines = numbers[0], []
    for operator, number, reading in zip(operators, numbers[1:], readings, strict=True):
        new = READINGS[reading](total, number)
        lines.append(f"{total} {operator} {number} {reading} {new}")
        total = new
    return "\n".join([*lines, f"Answer: {total}"])


def trail(text: str) -> str:
    """Return the last word of every line, in order."""
    return " ".join((line.split() or ["?"])[-1] for line in text.strip().split("\n"))


def strict(completion: str, answer: str) -> bool:
    """Judge a solution by all of its totals in order, so that a wrong line cannot pass by luck."""
    return bool(re.search(r"Answer: \d\s*$", completion)) and trail(completion) == answer


def true_rules(question: str, count: int | None = None) -> str:
    """Return the true rules of a question's first operators, or of all, as the bank's notes have them."""
    operators = re.findall("[a-z]+", question)[:count]
    return "\n".join(["## Heuristics", *(f"- If I see {each}, then {each} is {truth()[each]}." for each in operators)])


def true_solution(question: str) -> str:
    """Return the right solution of a question."""
    operators = re.findall("[a-z]+", question)
    return solution([int(each) for each in re.findall(r"\d", question)], operators, [truth()[o] for o in operators])


def rules_in(text: str) -> list[tuple[str, str]]:
    """Return (operator, reading) of every rule in a text."""
    return [(first, reading) for first, second, reading in _RULE.findall(text) if first == second]


@lru_cache(maxsize=16)
def questions(regime: str, split: str) -> tuple[tuple[str, str], ...]:
    """Return (question, answer) of a regime and split. Held-out questions are in no training split."""
    lengths = (LONGER if split == "longer" else REGIMES)[regime]
    rng, rows = random.Random(f"{SEED} {regime} {split}"), dict[str, str]()
    earlier = {"train": ("test", "tune", "longer"), "tune": ("test",)}.get(split, ())
    taken = {text for each in earlier for text, _ in questions(regime, each)}
    while len(rows) < SPLITS[split]:
        length = rng.choice(lengths)
        operators = rng.sample(OPERATORS, length)
        numbers = [rng.randint(0, 9) for _ in range(length + 1)]
        text = str(numbers[0]) + "".join(f" {o} {n}" for o, n in zip(operators, numbers[1:], strict=True)) + "?"
        if text not in taken:
            rows[text] = trail(solution(numbers, operators, [truth()[each] for each in operators]))
    return tuple(rows.items())


def tasks(regime: str, split: str) -> datasets.Dataset:
    """Return the tasks with the columns `prompt` (a conversation) and `answer` (for `strict`)."""
    return dataset(questions(regime, split))


def dataset(rows: Sequence[tuple[str, str]]) -> datasets.Dataset:
    """Return (question, answer) as tasks."""
    import datasets

    made: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": text}], "answer": answer} for text, answer in rows
    ]
    return datasets.Dataset.from_list(made)
