"""The demo's task family: chains of numbers and made-up words, where each word adds, takes or swaps.

The question does not say what a word means; only the reward does. Solutions name the reading of every word, so that a
rule about one word can change them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mel_lite.data.demo_tasks import INSTRUCTION

READINGS = ("adds", "takes", "swaps")
"""a + b, a - b, b - a."""
MEANINGS: dict[str, str] = {
    "zig": "adds", "lum": "adds", "pom": "takes", "vex": "takes", "dub": "swaps", "hob": "swaps"
}  # fmt: skip
"""Right reading of each word."""


@dataclass(frozen=True, slots=True)
class Line:
    """One step: `left word right`, read in one way, with its total, which may be miscounted."""

    left: int
    word: str
    right: int
    reading: str
    total: int

    def __str__(self) -> str:
        first, sign, second = {
            "adds": (self.left, "+", self.right),
            "takes": (self.left, "-", self.right),
            "swaps": (self.right, "-", self.left),
        }[self.reading]
        return f"{self.left} {self.word} {self.reading} {self.right}: {first} {sign} {second} = {self.total}"


@dataclass(frozen=True, slots=True)
class Chain:
    """`numbers[0] words[0] numbers[1] ...`, worked out from left to right."""

    numbers: tuple[int, ...]
    words: tuple[str, ...]

    @property
    def expression(self) -> str:
        rest = (f" {word} {number}" for word, number in zip(self.words, self.numbers[1:], strict=True))
        return f"{self.numbers[0]}{''.join(rest)}"

    @property
    def question(self) -> str:
        return f"What is {self.expression}? {INSTRUCTION}"

    @property
    def answer(self) -> int:
        return self.lines([MEANINGS[word] for word in self.words])[-1].total

    def lines(self, readings: Sequence[str], miscounts: Mapping[int, int] | None = None) -> tuple[Line, ...]:
        """Return the steps under these readings, one per word; `miscounts` adds a number to the total of a step."""
        total, lines = self.numbers[0], []
        for at, (word, number, reading) in enumerate(zip(self.words, self.numbers[1:], readings, strict=True)):
            result = {"adds": total + number, "takes": total - number, "swaps": number - total}[reading]
            lines.append(Line(total, word, number, reading, result + (miscounts or {}).get(at, 0)))
            total = lines[-1].total
        return tuple(lines)


def solution(lines: Sequence[Line], answer: int | None = None) -> str:
    """Return one line per step and the answer line; the answer is the last total if it is not given."""
    return "\n".join([*map(str, lines), f"Answer: {lines[-1].total if answer is None else answer}"])


def draw(rng: random.Random, words: int = 2) -> Chain:
    """Draw a chain of digits from 1 to 9 whose right totals are in [0, 18].

    Its answer is no number of the question and no earlier total, so that a quoted step seldom shows it, and no other
    reading of one word gives it.
    """
    while True:
        chain = Chain(tuple(rng.randint(1, 9) for _ in range(words + 1)), tuple(rng.sample(list(MEANINGS), words)))
        right = [MEANINGS[word] for word in chain.words]
        totals = [line.total for line in chain.lines(right)]
        others = [
            chain.lines([*right[:at], reading, *right[at + 1 :]])[-1].total
            for at in range(words)
            for reading in READINGS
            if reading != right[at]
        ]
        if all(0 <= total <= 18 for total in totals) and totals[-1] not in (*chain.numbers, *totals[:-1], *others):
            return chain
