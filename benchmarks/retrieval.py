"""Measure if lexical retrieval finds right lessons: `python benchmarks/retrieval.py` (seconds; needs the `gym` extra).

Three sets of questions, each with a bank of lessons from other questions of the set, and a rule that says which lessons
are right for a question:

    operators   made-up operators (`3 zap 7 dax 2?`); right: rules on an operator of the question
    demo        the demo's test tasks, lessons of its warm start; right: rules on a word of the question
    tasks       twelve reasoning-gym tasks in words; right: lessons of the same task

Each is compared with the expected value of as many lessons drawn at random from the same bank. Results:
benchmarks/results/retrieval.json.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo_warmup import lessons as warm_start
from mel_lite.data import demo_tasks
from mel_lite.data.demo_tasks.words import READINGS, draw
from mel_lite.evaluate import bootstrap_interval
from mel_lite.lessons.bank.retrieval import LexicalRetrieval, Retrieval
from mel_lite.types import BankLesson

SEED = 20261129
RESULTS = Path(__file__).parent / "results" / "retrieval.json"
CUTS = (1, 3, 8)
"""k of precision at k; 8 is the default of `bank_limit`."""
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Case:
    """Lessons of a bank, and for each question the ids of those that are right for it."""

    name: str
    lessons: tuple[BankLesson, ...]
    questions: tuple[tuple[str, frozenset[int]], ...]


def _lesson(id_: int, heuristic: str, question: str) -> BankLesson:
    return BankLesson(id_, heuristic, question, 1.0, 1, False, 0)


# ---- made-up operators


def _operators(count: int) -> list[str]:
    """Return words of three letters that are no English stop words."""
    syllables = [a + b + c for a in "bdfgjklmrvwz" for b in "aeiou" for c in "fklpxz"]
    return random.Random(SEED).sample(syllables, count)


def _chain(rng: random.Random, operators: Sequence[str]) -> str:
    return str(rng.randint(0, 9)) + "".join(f" {each} {rng.randint(0, 9)}" for each in operators) + "?"


def operators(count: int, lengths: Sequence[int], lessons: int, questions: int) -> Case:
    """Make questions over `count` operators, and lessons on one operator of such a question each."""
    rng, names = random.Random(f"{SEED} {count} {lengths}"), _operators(count)
    bank, about = [], []
    for id_ in range(lessons):
        asked = rng.sample(names, rng.choice(lengths))
        about.append(rng.choice(asked))
        reading = rng.choice(("add", "take", "from"))
        bank.append(_lesson(id_, f"- If I see {about[-1]}, then {about[-1]} is {reading}.", _chain(rng, asked)))
    cases = []
    for _ in range(questions):
        asked = rng.sample(names, rng.choice(lengths))
        cases.append((_chain(rng, asked), frozenset(i for i, op in enumerate(about) if op in asked)))
    return Case(f"{count} operators, {min(lengths)} to {max(lengths)} per question", tuple(bank), tuple(cases))


# ---- the demo's tasks


def demo(lessons: int) -> Case:
    """Take the demo's test tasks, and lessons of its warm start on a word of another task each."""
    rng = random.Random(f"{SEED} demo")
    lines = demo_tasks.path("test").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    bank: list[BankLesson] = []
    about = []
    while len(bank) < lessons:
        chain = draw(rng)
        if chain.question not in prompts:
            about.append(rng.choice(chain.words))
            bank.append(_lesson(len(bank), warm_start.rule(about[-1], rng.choice(READINGS)), chain.question))
    words = [set(prompt.split()) | set(prompt.partition("?")[0].split()) for prompt in prompts]
    right = [frozenset(i for i, word in enumerate(about) if word in asked) for asked in words]
    return Case("demo tasks", tuple(bank), tuple(zip(prompts, right, strict=True)))


# ---- tasks in words

RULES: dict[str, str] = {
    "leg_counting": "When I count legs, I must multiply each animal by its own number of legs before I add.",
    "calendar_arithmetic": "If a date is asked for, then I count the days that pass and take the rest after weeks.",
    "family_relationships": "When relatives are listed, I must write who is whose parent before I name the relation.",
    "time_intervals": "If the minutes of the end are fewer than those of the start, then I borrow an hour.",
    "number_sorting": "When I sort numbers, I must compare the signs before the sizes.",
    "letter_counting": "When I count a letter, I must go through each word and mark every hit.",
    "caesar_cipher": "If a text is shifted, then I find one short word first and try its shift on the rest.",
    "prime_factorization": "When I factor, I must divide by the smallest prime until it no longer divides.",
    "gcd": "If a common divisor is asked for, then I replace the larger number by the remainder.",
    "gsm_symbolic": "When a story has several quantities, I must write each with its unit before I combine them.",
    "syllogism": "If a statement says some, then I must not conclude anything about all.",
    "products": "When I multiply long numbers, I must align each partial product before I add.",
}
"""One rule per task, in general words, as the analysis prompt asks for."""


def tasks(lessons_each: int, questions_each: int) -> Case:
    """Take questions of reasoning-gym tasks, and lessons from other questions of the same tasks."""
    import reasoning_gym

    bank: list[BankLesson] = []
    task_of: list[str] = []
    asked: list[tuple[str, str]] = []
    for task, rule in RULES.items():
        made = reasoning_gym.create_dataset(task, seed=SEED, size=lessons_each + questions_each)
        texts = [entry["question"] for entry in made]
        for text in texts[:lessons_each]:
            bank.append(_lesson(len(bank), f"- {rule}", text))
            task_of.append(task)
        asked += [(text, task) for text in texts[lessons_each:]]
    right = [(text, frozenset(i for i, name in enumerate(task_of) if name == task)) for text, task in asked]
    return Case("12 tasks in words", tuple(bank), tuple(right))


# ---- measures


def measure(case: Case, retrieval: Retrieval) -> dict[str, Any]:
    """Return precision at k and recall next to their chance values, over the questions with a right lesson in the bank.

    A question without any match has precision 0. `random` is the expected value for as many lessons drawn from the
    bank, and `better` the mean difference over questions with its 95 % bootstrap interval.
    """
    answerable = [(question, right) for question, right in case.questions if right]
    found = [[lesson.id for lesson in retrieval(question, case.lessons)] for question, _ in answerable]
    rights = [right for _, right in answerable]
    size = len(case.lessons)
    shares = [len(right) / size for right in rights]
    precision = []
    for k in CUTS:
        hits = [len(right & set(ids[:k])) / max(1, len(ids[:k])) for ids, right in zip(found, rights, strict=True)]
        precision.append({"k": k} | _compared(hits, shares))
    recall = [len(right & set(ids)) / len(right) for ids, right in zip(found, rights, strict=True)]
    return {
        "case": case.name,
        "lessons": size,
        "questions": len(answerable),
        "lessons_found": _mean([len(ids) for ids in found]),
        "without_match": sum(not ids for ids in found),
        "precision": precision,
        "recall": _compared(recall, [len(ids) / size for ids in found]),
    }


def foreign(cases: Sequence[Case], retrieval: Retrieval) -> Iterator[dict[str, Any]]:
    """Yield for each bank how many questions of the other cases it answers: each match is a foreign lesson."""
    for case in cases:
        questions = [question for other in cases if other is not case for question, _ in other.questions]
        matched = sum(bool(retrieval(question, case.lessons)) for question in questions)
        yield {"bank": case.name, "questions": len(questions), "matched": matched}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _compared(values: Sequence[float], chance: Sequence[float]) -> dict[str, Any]:
    shifts = [a - b for a, b in zip(values, chance, strict=True)]
    better = bootstrap_interval(shifts, resamples=RESAMPLES, seed=SEED)
    return {"value": _mean(values), "random": _mean(chance), "better": asdict(better)}


def run() -> dict[str, Any]:
    """Measure every case."""
    from importlib.metadata import version

    studied = operators(60, (5, 6), 180, 150)
    shown = demo(200)
    worded = tasks(12, 12)
    cases = [operators(24, (2, 3, 4), 72, 150), studied, shown, worded]
    retrieval = LexicalRetrieval()
    return {
        "seed": SEED,
        "versions": {name: version(name) for name in ("bm25s", "reasoning-gym")},
        "cases": [measure(case, retrieval) for case in cases],
        "foreign": list(foreign([studied, shown, worded], retrieval)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    text = json.dumps(run(), indent=1)
    arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
