"""Warm-up examples: solving, analyzing a pair, and solving with notes in the prompt.

Each is `{"prompt": messages, "completion": text, "kind": ...}` with the prompts of `mel_lite.lessons.prompts`, so that
rendering it gives the tokens of a MEL step.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from demo_warmup.phrases import CONTINUES, ONLY_ANSWER, PARTING, PARTING_AT_LAST, STOPS_EARLY, WORDINGS
from demo_warmup.problems import Problem, Slip, draw_problem, draw_slip, draw_style, write_solution
from mel_lite.data import demo_tasks
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import parse_analysis
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES, Templates
from mel_lite.models.chat import prompt_text
from mel_lite.types import Finish, MetaExperience

SEED = 20261123
COUNTS = {"solve": 240, "chain": 120, "analyse": 320, "replay": 160}
"""Number of examples of each kind in the shipped recipe. Kinds are spelled as in the shipped examples."""
LONG = (7, 8, 9, 10)
"""Possible numbers of terms in a long chain, which has more arithmetic per prompt token than a task."""
SAME_STYLE = 0.9
"""Share of pairs with one style for both solutions: the trainer pairs solutions with the longest common prefix."""
FOREIGN_NOTES = 0.3
"""Share of replay examples whose notes come from another problem."""


def _bifurcation(problem: Problem, slip: Slip, rng: random.Random) -> str:
    """Describe where the two solutions diverge, and quote their lines; the right line only if it is not the answer."""
    right, wrong = problem.steps(), slip.steps
    at = next((n for n, (a, b) in enumerate(zip_longest(right, wrong)) if a != b), None)
    if at is None:
        wordings = ONLY_ANSWER
    elif at >= len(wrong):
        wordings = STOPS_EARLY
    elif at >= len(right):
        wordings = CONTINUES
    else:
        wordings = PARTING_AT_LAST if at == len(right) - 1 else PARTING
    return rng.choice(wordings).format(
        k=None if at is None else at + 1,
        bad=wrong[at] if at is not None and at < len(wrong) else "",
        good=right[at] if at is not None and at < len(right) - 1 else "",
        verdict=rng.choice(WORDINGS[slip.kind].verdict),
        written=slip.answer,
    )


def _analysis(problem: Problem, slip: Slip, rng: random.Random) -> str:
    """Write one analysis of the slip, section by section; it may leak the answer."""
    adds = problem.signs[slip.at - 1] > 0
    wording = WORDINGS[slip.kind]
    sections = {
        "Bifurcation": _bifurcation(problem, slip, rng),
        "Critique": f"{rng.choice(wording.cause)} {rng.choice(wording.shield)}",
        "Reflection": rng.choice(wording.reflection),
        "Heuristics": f"- {rng.choice(wording.rules + (wording.rules_up if adds else wording.rules_down))}",
    }
    return "\n\n".join(f"## {name}\n{text}" for name, text in sections.items())


def _clean_analysis(problem: Problem, slip: Slip, right_text: str, rng: random.Random) -> tuple[str, MetaExperience]:
    """Return an analysis that the leak guard accepts. Raises: LookupError if none of 20 is accepted."""
    for _ in range(20):
        text = _analysis(problem, slip, rng)
        parsed = parse_analysis(text, finish=Finish.STOP)
        question, answer = prompt_text(problem.question), str(problem.answer)
        if not check_leak(
            parsed, answer=answer, right_text=right_text, prompt_text=question, policy="reject", raw_text=text
        ).leaks:
            return text, parsed
    raise LookupError(f"every wording for {problem.expression} leaks the answer {problem.answer}")


def _pair(rng: random.Random, unused: Iterator[Problem]) -> tuple[Problem, str, str, str, MetaExperience]:
    """Return a problem, its right and a wrong solution, the analysis of both, and the parsed analysis."""
    while True:
        problem = next(unused)
        slip = draw_slip(problem, rng)
        style = draw_style(rng)
        right = write_solution(problem.terms[0], problem.steps(), problem.answer, style)
        if rng.random() > SAME_STYLE:
            style = draw_style(rng)
        try:
            wrong = write_solution(problem.terms[0], slip.steps, slip.answer, style)
            return problem, right, wrong, *_clean_analysis(problem, slip, right, rng)
        except LookupError:
            continue


def solve(rng: random.Random, unused: Iterator[Problem]) -> dict[str, Any]:
    """Make an example of a question and its right solution."""
    problem = next(unused)
    text = write_solution(problem.terms[0], problem.steps(), problem.answer, draw_style(rng))
    return {"prompt": problem.question, "completion": text, "kind": "solve"}


def chain(rng: random.Random, unused: Iterator[Problem]) -> dict[str, Any]:
    """Make an example of a longer question of the same form and its right solution in numbered lines."""
    problem = draw_problem(rng, LONG)
    text = write_solution(problem.terms[0], problem.steps(), problem.answer, 0)
    return {"prompt": problem.question, "completion": text, "kind": "chain"}


def analyze(rng: random.Random, unused: Iterator[Problem], templates: Templates = DEFAULT_TEMPLATES) -> dict[str, Any]:
    """Make an example of the analysis prompt for a pair and the analysis."""
    problem, right, wrong, text, _ = _pair(rng, unused)
    user = templates.analysis_user
    for name, value in (("question", problem.question[-1]["content"]), ("wrong", wrong), ("right", right)):
        user = user.replace("{" + name + "}", value)
    system = {"role": "system", "content": templates.analysis_system}
    return {"prompt": [system, {"role": "user", "content": user}], "completion": text, "kind": "analyse"}


def replay(rng: random.Random, unused: Iterator[Problem], templates: Templates = DEFAULT_TEMPLATES) -> dict[str, Any]:
    """Make an example of a question with notes on it, or on another one, and its right solution."""
    problem, right, _, _, notes = _pair(rng, unused)
    if rng.random() < FOREIGN_NOTES:
        _, _, _, _, notes = _pair(rng, unused)
    user = templates.replay_user.replace("{question}", problem.question[-1]["content"])
    user = user.replace("{experience}", notes.as_text())
    return {"prompt": [{"role": "user", "content": user}], "completion": right, "kind": "replay"}


def test_expressions() -> frozenset[str]:
    """Return the expressions of the demo's test tasks, which no example may use."""
    lines = demo_tasks.path("test").read_text(encoding="utf-8").splitlines()
    return frozenset(json.loads(line)["prompt"].removeprefix("What is ").partition("?")[0] for line in lines)


def _unused_problems(rng: random.Random) -> Iterator[Problem]:
    forbidden = test_expressions()
    while True:
        problem = draw_problem(rng)
        if problem.expression not in forbidden:
            yield problem


def make_examples(
    counts: dict[str, int] | None = None, *, seed: int = SEED, templates: Templates = DEFAULT_TEMPLATES
) -> list[dict[str, Any]]:
    """Return shuffled examples with the prompts of `templates`; equal arguments give equal examples."""
    counts = COUNTS if counts is None else counts
    rng = random.Random(seed)
    unused = _unused_problems(rng)
    makers: dict[str, Callable[[random.Random, Iterator[Problem]], dict[str, Any]]] = {
        "solve": solve,
        "chain": chain,
        "analyse": partial(analyze, templates=templates),
        "replay": partial(replay, templates=templates),
    }
    examples = [makers[kind](rng, unused) for kind, count in counts.items() for _ in range(count)]
    rng.shuffle(examples)
    return examples


def write_examples(file: Path, counts: dict[str, int] | None = None, *, seed: int = SEED) -> int:
    """Write the examples as JSONL, and return their number."""
    examples = make_examples(counts, seed=seed)
    file.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return len(examples)
