"""Sums and differences with a running total: right solutions, and wrong ones with one slip of a known kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from mel_lite.data.demo_tasks import INSTRUCTION
from mel_lite.types import Message


@dataclass(frozen=True, slots=True)
class Problem:
    """`terms[0] + signs[0] * terms[1] + ...`, with signs of 1 or -1."""

    terms: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def expression(self) -> str:
        """Expression in the format of the demo tasks, such as `5 - 2 + 8`."""
        rest = (f" {'+' if sign > 0 else '-'} {term}" for sign, term in zip(self.signs, self.terms[1:], strict=True))
        return f"{self.terms[0]}{''.join(rest)}"

    @property
    def question(self) -> list[Message]:
        """Prompt of a demo task, as a conversation."""
        return [{"role": "user", "content": f"What is {self.expression}? {INSTRUCTION}"}]

    @property
    def answer(self) -> int:
        return self.steps()[-1].result

    def steps(self) -> tuple[Step, ...]:
        """Return the right steps, one per term after the first."""
        return carry_on(self.terms[0], tuple(zip(self.signs, self.terms[1:], strict=True)))


@dataclass(frozen=True, slots=True)
class Step:
    """One line: `left` plus or minus `term` equals `result`, which may be wrong."""

    left: int
    sign: int
    term: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {'+' if self.sign > 0 else '-'} {self.term} = {self.result}"


def carry_on(total: int, moves: Sequence[tuple[int, int]]) -> tuple[Step, ...]:
    """Return the right steps from `total`, one per (sign, term)."""
    steps = []
    for sign, term in moves:
        steps.append(Step(total, sign, term, total + sign * term))
        total = steps[-1].result
    return tuple(steps)


def draw_problem(rng: random.Random, terms: Sequence[int] = (3, 4)) -> Problem:
    """Draw a problem of one-digit terms, with running totals in the range that four terms can reach.

    Args:
        terms: possible numbers of terms.
    """
    while True:
        count = rng.choice(terms)
        numbers = tuple(rng.randint(0, 9) for _ in range(count))
        problem = Problem(numbers, tuple(rng.choice((1, -1)) for _ in range(count - 1)))
        if all(-27 <= step.result <= 36 for step in problem.steps()):
            return problem


# ---- solutions as text -----------------------------------------------------------------------------------------------


def _numbered(start: int, steps: Sequence[Step]) -> list[str]:
    return [f"Step {number}: {step}" for number, step in enumerate(steps, 1)]


def _bare(start: int, steps: Sequence[Step]) -> list[str]:
    return [f"Start with {start}.", *map(str, steps)]


def _narrated(start: int, steps: Sequence[Step]) -> list[str]:
    words = ["First", *["Then"] * (len(steps) - 2), "Finally"] if len(steps) > 1 else ["First"]
    return [f"{word}, {step}." for word, step in zip(words, steps, strict=True)]


def _totals(start: int, steps: Sequence[Step]) -> list[str]:
    return [f"The running total starts at {start}.", *(f"Next, {step}." for step in steps)]


STYLES: tuple[tuple[Callable[[int, Sequence[Step]], list[str]], int], ...] = (
    (_numbered, 6),
    (_bare, 2),
    (_narrated, 1),
    (_totals, 1),
)
"""(function that writes the lines, relative frequency)."""


def draw_style(rng: random.Random) -> int:
    """Draw an index into STYLES."""
    return rng.choices(range(len(STYLES)), weights=[weight for _, weight in STYLES])[0]


def write_solution(start: int, steps: Sequence[Step], answer: int, style: int) -> str:
    """Return one line per step and the answer line."""
    return "\n".join([*STYLES[style][0](start, steps), f"Answer: {answer}"])


# ---- slips -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slip:
    """Wrong solution: the kind of slip, its step in the right solution (from 1), and the written steps and answer."""

    kind: str
    at: int
    steps: tuple[Step, ...]
    answer: int
    wrong_total: int
    """First wrong total in the wrong solution."""


def _replaced(problem: Problem, at: int, wrong: Sequence[Step]) -> tuple[Step, ...]:
    """Return the right steps before step `at`, then `wrong`, then right arithmetic on a wrong total."""
    before = problem.steps()[: at - 1]
    total = wrong[-1].result if wrong else (before[-1].result if before else problem.terms[0])
    moves = list(zip(problem.signs, problem.terms[1:], strict=True))[at:]
    return (*before, *wrong, *carry_on(total, moves))


def _miscounted(problem: Problem, at: int, rng: random.Random) -> tuple[Step, ...]:
    right = problem.steps()[at - 1]
    off = rng.choice((-2, -1, -1, -1, 1, 1, 1, 2, 10, -10))
    return _replaced(problem, at, [Step(right.left, right.sign, right.term, right.result + off)])


def _flipped(problem: Problem, at: int, rng: random.Random) -> tuple[Step, ...]:
    right = problem.steps()[at - 1]
    return _replaced(problem, at, carry_on(right.left, [(-right.sign, right.term)]))


def _misread(problem: Problem, at: int, rng: random.Random) -> tuple[Step, ...]:
    right = problem.steps()[at - 1]
    other = rng.choice([digit for digit in range(10) if digit != right.term])
    return _replaced(problem, at, carry_on(right.left, [(right.sign, other)]))


def _dropped(problem: Problem, at: int, rng: random.Random) -> tuple[Step, ...]:
    return _replaced(problem, at, [])


def _repeated(problem: Problem, at: int, rng: random.Random) -> tuple[Step, ...]:
    right = problem.steps()[at - 1]
    return _replaced(problem, at, carry_on(right.left, [(right.sign, right.term)] * 2))


def _stale(problem: Problem, at: int, rng: random.Random) -> tuple[Step, ...]:
    """Continue from the total before the last one; at step 2 that is the first number."""
    right = problem.steps()[at - 1]
    if at < 2:
        return problem.steps()
    return _replaced(problem, at, carry_on(problem.steps()[at - 2].left, [(right.sign, right.term)]))


def _unsigned(problem: Problem, at: int, rng: random.Random) -> tuple[Step, ...]:
    """Subtract in reverse order where the total is negative, which loses the minus sign."""
    right = problem.steps()[at - 1]
    return _replaced(problem, at, [Step(right.left, right.sign, right.term, abs(right.result))])


SLIPS: dict[str, tuple[Callable[[Problem, int, random.Random], tuple[Step, ...]], int]] = {
    "miscounted": (_miscounted, 9),
    "flipped": (_flipped, 3),
    "misread": (_misread, 3),
    "dropped": (_dropped, 2),
    "repeated": (_repeated, 1),
    "stale": (_stale, 2),
    "unsigned": (_unsigned, 3),
}
"""Kind of slip -> (function that returns the wrong steps, relative frequency)."""
LAST_LINE = "last_line"
"""Slip with right steps and a wrong answer line."""


def draw_slip(problem: Problem, rng: random.Random) -> Slip:
    """Draw a slip that changes the answer."""
    while True:
        if rng.random() < 0.08:
            answer = rng.choice([problem.steps()[-2].result, problem.answer + rng.choice((-1, 1)), -problem.answer])
            slip = Slip(LAST_LINE, len(problem.steps()), problem.steps(), answer, answer)
        else:
            kind = rng.choices(list(SLIPS), weights=[weight for _, weight in SLIPS.values()])[0]
            at = rng.randint(1, len(problem.signs))
            steps = SLIPS[kind][0](problem, at, rng)
            if kind != "repeated":  # for a repeated step the solutions diverge one line later
                at = next((n for n, (a, b) in enumerate(zip_longest(problem.steps(), steps), 1) if a != b), at)
            changed = min(at if kind == "repeated" else at - 1, len(steps) - 1)
            answer = steps[-1].result if steps else problem.terms[0]
            slip = Slip(kind, at, steps, answer, steps[changed].result if steps else answer)
        if slip.answer != problem.answer:
            return slip
