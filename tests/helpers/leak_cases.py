"""Labeled corpus of leaks, and a function that applies the guard to one case."""

from __future__ import annotations

import json
from pathlib import Path

from mel_lite.lessons.leak_guard import check_leak
from mel_lite.types import LeakReport, MetaExperience

CORPUS = [json.loads(line) for line in (Path(__file__).parent / "leak_corpus.jsonl").read_text().splitlines()]
CLEAN = {
    "bifurcation": "The second step drifts away.",
    "critique": "A rushed reading of the question.",
    "heuristic": "If unsure, then read the question again.",
}


def check(
    text: str,
    *,
    answer: str | None = "474",
    right: str = "",
    question: str = "How many?",
    policy: str = "reject",
    part: str = "critique",
    raw: str | None = None,
) -> LeakReport:
    experience = MetaExperience(**CLEAN | {part: text})
    return check_leak(experience, answer=answer, right_text=right, prompt_text=question, policy=policy, raw_text=raw)


def check_case(case: dict[str, str], policy: str = "reject") -> LeakReport:
    return check(
        case["text"],
        answer=case["answer"],
        right=case["right"],
        question=case["question"],
        part=case["part"],
        policy=policy,
    )
