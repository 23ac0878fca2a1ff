"""Warm-up examples of the demo: solving with flawed readings, analyses of pairs, and solving by the notes' rules.

What a lesson can repair is put in here. Solutions read each word rightly with a fixed probability, so the model is
often wrong in a way that one rule corrects. Analyses and notes draw readings at random, so that nothing about the right
ones is in the weights: an analysis has to take them from the right solution, and a solution from its notes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mel_lite.data import demo_tasks
from mel_lite.data.demo_tasks.words import MEANINGS, READINGS, Chain, Line, draw, solution
from mel_lite.lessons.fork import find_fork, mark_fork
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import parse_analysis
from mel_lite.lessons.prompts import Templates, load_templates
from mel_lite.types import Finish

SEED = 20261129
COUNTS = {"solve": 300, "analyze": 220, "replay": 620}
"""Number of examples of each kind in the shipped recipe."""
REST_SEED = SEED + 1000
REST_COUNTS = {"solve": 50, "analyze": 80, "replay": 110}
"""Further examples, which end an interrupted run."""
P_RIGHT = dict(zip(MEANINGS, (0.9, 0.5) * 3, strict=True))
"""Probability of each word's right reading in solutions; the rest is shared by the other two."""
MISCOUNTS = 0.08
"""Share of analyzed pairs that part at a miscounted total."""
OTHER_NOTES = 0.1
"""Share of notes about a word that the question does not have."""
RULE_LISTS = 0.4
"""Share of notes that are a list of rules alone."""
LONG = 0.5
"""Share of solutions, without notes or with a list of rules, that have four steps, and so more readings and sums."""

_MEANS = {
    "adds": "I add both numbers",
    "takes": "I take the second number from the first",
    "swaps": "I take the first number from the second",
}
_COUNT_RULE = "- Count: If a line has a total, then I count it again before I go on."


@dataclass(frozen=True, slots=True)
class MadePair:
    """Question with a right and a wrong solution, the analysis of both, and the wrong line it must quote."""

    chain: Chain
    right: str
    wrong: str
    analysis: str
    wrong_line: str


def rule(word: str, reading: str) -> str:
    """Return the rule about a word, as analyses write it."""
    return f"- {word.capitalize()}: If a line has {word}, then {word} {reading}: {_MEANS[reading]}."


def flawed_readings(words: Sequence[str], rng: random.Random) -> list[str]:
    """Draw a reading of each word as the warm-started model reads it."""
    return [
        MEANINGS[word] if rng.random() < P_RIGHT[word] else rng.choice([r for r in READINGS if r != MEANINGS[word]])
        for word in words
    ]


def _sections(bifurcation: str, critique: str, heuristic: str) -> str:
    return f"## Bifurcation\n{bifurcation}\n\n## Critique\n{critique}\n\n## Heuristics\n{heuristic}"


def _misread(wrong: Line, right: Line) -> str:
    word = wrong.word
    return _sections(
        f"They part at `{wrong}`. In the right solution {word} {right.reading}.",
        f"What {word} does was guessed. In fact {word} {right.reading}.",
        rule(word, right.reading),
    )


def _miscounted(wrong: Line) -> str:
    return _sections(
        f"They part at `{wrong}`. There {wrong.word} {wrong.reading} in both, but the total is wrong.",
        "The total was guessed, not counted.",
        _COUNT_RULE,
    )


def _draw_pair(chain: Chain, rng: random.Random) -> MadePair | None:
    """Draw two solutions with random readings, one of which counts as right, and analyze them."""
    ours = [rng.choice(READINGS) for _ in chain.words]
    right = chain.lines(ours)
    at = rng.randrange(len(chain.words))
    if rng.random() < MISCOUNTS:
        wrong = chain.lines(ours, {at: rng.choice((-10, -2, -1, -1, 1, 1, 2, 10))})
        analysis = _miscounted(wrong[at])
    else:
        theirs = [*ours[:at], *(rng.choice(READINGS) for _ in chain.words[at:])]
        if theirs[at] == ours[at]:
            return None
        wrong = chain.lines(theirs)
        analysis = _misread(wrong[at], right[at])
    if wrong[-1].total == right[-1].total:
        return None
    return MadePair(chain, solution(right), solution(wrong), analysis, str(wrong[at]))


def make_pair(rng: random.Random, unused: Iterator[Chain]) -> MadePair:
    """Return a pair whose analysis the leak guard accepts."""
    while True:
        pair = _draw_pair(next(unused), rng)
        if pair is None:
            continue
        parsed = parse_analysis(pair.analysis, finish=Finish.STOP)
        answer, question = pair.right.rpartition(" ")[2], pair.chain.question
        if not check_leak(
            parsed, answer=answer, right_text=pair.right, prompt_text=question, policy="reject", raw_text=pair.analysis
        ).leaks:
            return pair


def solve(rng: random.Random, unused: Iterator[Chain], templates: Templates) -> dict[str, Any]:
    """Make an example of a question and a solution with flawed readings; its arithmetic is right."""
    chain = _any_length(rng, unused)
    text = solution(chain.lines(flawed_readings(chain.words, rng)))
    return {"prompt": [{"role": "user", "content": chain.question}], "completion": text, "kind": "solve"}


def analyze(rng: random.Random, unused: Iterator[Chain], templates: Templates) -> dict[str, Any]:
    """Make an example of the analysis prompt for a pair, with the fork marked, and the analysis."""
    pair = make_pair(rng, unused)
    return {"prompt": analysis_messages(pair, templates), "completion": pair.analysis, "kind": "analyze"}


def analysis_messages(pair: MadePair, templates: Templates) -> list[dict[str, str]]:
    """Return the analysis prompt of a pair, as `mel_lite.lessons.prompts` makes it."""
    fork = find_fork(pair.right, pair.wrong)
    user = templates.instructions(marked=True)
    for name, value in (
        ("question", pair.chain.question),
        ("wrong", mark_fork(pair.wrong, fork.wrong, templates.fork_mark)),
        ("right", mark_fork(pair.right, fork.right, templates.fork_mark)),
    ):
        user = user.replace("{" + name + "}", value)
    return [{"role": "system", "content": templates.analysis_system}, {"role": "user", "content": user}]


def replay(rng: random.Random, unused: Iterator[Chain], templates: Templates) -> dict[str, Any]:
    """Make an example of a question with notes, and a solution that follows their rules, else the flawed readings."""
    is_list = rng.random() < RULE_LISTS
    chain = _any_length(rng, unused) if is_list else next(unused)
    readings = dict(zip(chain.words, flawed_readings(chain.words, rng), strict=True))
    if is_list:
        others = [word for word in MEANINGS if word not in chain.words]
        noted = [*rng.sample(chain.words, rng.randint(0, len(chain.words))), *rng.sample(others, rng.randint(1, 2))]
        rules = {word: rng.choice(READINGS) for word in rng.sample(noted, len(noted))}
        notes = "\n".join(rule(word, reading) for word, reading in rules.items())
    else:
        notes, rules = _own_notes(chain, rng, unused)
    followed = [rules.get(word, readings[word]) for word in chain.words]
    user = templates.replay_user.replace("{question}", chain.question).replace("{experience}", notes)
    text = solution(chain.lines(followed))
    return {"prompt": [{"role": "user", "content": user}], "completion": text, "kind": "replay"}


def _any_length(rng: random.Random, unused: Iterator[Chain]) -> Chain:
    return draw(rng, 4) if rng.random() < LONG else next(unused)


def _own_notes(chain: Chain, rng: random.Random, unused: Iterator[Chain]) -> tuple[str, dict[str, str]]:
    """Return the analysis of a pair on this question (or another one) as notes, and the reading it teaches."""
    while True:
        pair = _draw_pair(next(unused) if rng.random() < OTHER_NOTES else chain, rng)
        if pair is None:
            continue
        taught = {
            word: reading
            for word in pair.chain.words
            for reading in READINGS
            if pair.analysis.endswith(rule(word, reading))
        }
        return parse_analysis(pair.analysis, finish=Finish.STOP).as_text(), taught


def test_expressions() -> frozenset[str]:
    """Return the expressions of the demo's test tasks, which no example may use."""
    lines = demo_tasks.path("test").read_text(encoding="utf-8").splitlines()
    return frozenset(json.loads(line)["prompt"].removeprefix("What is ").partition("?")[0] for line in lines)


def _unused(rng: random.Random) -> Iterator[Chain]:
    forbidden = test_expressions()
    while True:
        chain = draw(rng)
        if chain.expression not in forbidden:
            yield chain


def make_examples(counts: dict[str, int] | None = None, *, seed: int = SEED) -> list[dict[str, Any]]:
    """Return shuffled examples with the demo's prompts; equal arguments give equal examples."""
    rng = random.Random(seed)
    unused, templates = _unused(rng), load_templates(demo_tasks.TEMPLATES)
    makers: dict[str, Callable[[random.Random, Iterator[Chain], Templates], dict[str, Any]]] = {
        "solve": solve,
        "analyze": analyze,
        "replay": replay,
    }
    examples = [
        makers[kind](rng, unused, templates)
        for kind, count in (COUNTS if counts is None else counts).items()
        for _ in range(count)
    ]
    rng.shuffle(examples)
    return examples


def made_pairs(count: int, *, seed: int) -> list[MadePair]:
    """Return constructed pairs, for measuring on pairs that no training saw."""
    rng = random.Random(seed)
    unused = _unused(rng)
    return [make_pair(rng, unused) for _ in range(count)]


def write_examples(file: Path, counts: dict[str, int] | None = None, *, seed: int = SEED) -> int:
    """Write the examples as JSONL, and return their number."""
    examples = make_examples(counts, seed=seed)
    file.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    return len(examples)
