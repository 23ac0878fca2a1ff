"""Lessons in the prompt against none: who is taught, pairing, and intervals by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from typing import Any

import datasets
import pytest
from rich.console import Console

from lesson_banks import bank_of, rule
from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.evaluate import Interval, bootstrap_interval, evaluate
from mel_lite.lessons.bank.prompt_memory import MemoryResult, evaluate_with_lessons
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES
from mel_lite.types import Finish, Group, Verdict
from tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Reader(Engine):
    """Answers 1 where its prompt has notes that name zap; else the parity of the seed."""

    name = "reader"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def wake(self) -> None:
        pass

    def sleep(self) -> None:
        pass

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        texts = [TOKENIZER.decode(request.prompt_ids) for request in requests]
        self.prompts += texts
        right = ["then zap is" in t or r.seed % 2 == 1 for t, r in zip(texts, requests, strict=True)]
        return [Completion((*TOKENIZER(str(int(yes)))["input_ids"], 2), (0.0, 0.0), Finish.STOP) for yes in right]


def judge(groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
    return [Verdict.RIGHT if text == group.answer else Verdict.WRONG for group, text in zip(groups, texts, strict=True)]


def measured(questions: Sequence[str], **options: Any) -> tuple[MemoryResult, Reader]:
    rows = [{"prompt": [{"role": "user", "content": question}], "answer": "1"} for question in questions]
    engine = Reader()
    bank = bank_of(("zap", "from"), ("dax", "add"))
    shared: dict[str, Any] = {"k": 4, "max_new_tokens": 4, "seed": 5}
    result = evaluate_with_lessons(
        engine, TOKENIZER, datasets.Dataset.from_list(rows), judge, bank=bank, templates=DEFAULT_TEMPLATES,
        **shared | options,
    )  # fmt: skip
    return result, engine


QUESTIONS = ["1 zap 2?", "4 bli 2?", "6 dax 5?", "1 zap 2?", "9 dax 9 zap 1?", "4 wix 4?"]


def test_each_question_is_asked_with_its_lessons_and_without() -> None:
    result, engine = measured(QUESTIONS)
    asked = len(engine.prompts) // 2
    plain, taught = engine.prompts[:asked], engine.prompts[asked:]
    assert not any("<notes>" in prompt for prompt in plain)
    notes = [
        prompt.split("<notes>\n")[1].split("\n</notes>")[0] if "<notes>" in prompt else "" for prompt in taught[:6]
    ]
    zap, dax = rule("zap", "from"), rule("dax", "add")
    heading = "## Heuristics\n"
    assert notes[:4] == [heading + zap, "", heading + dax, heading + zap] and notes[5] == ""
    assert notes[4] in (f"{heading}{zap}\n{dax}", f"{heading}{dax}\n{zap}")
    assert (result.tasks, result.taught, result.over_context, result.lessons_per_task) == (6, 4, 0, 1.25)
    rows = [{"prompt": [{"role": "user", "content": q}], "answer": "1"} for q in QUESTIONS]
    alone = evaluate(Reader(), TOKENIZER, datasets.Dataset.from_list(rows), judge, k=4, max_new_tokens=4, seed=5)
    assert result.plain == alone


def test_differences_are_paired_by_prompt() -> None:
    result, _ = measured(QUESTIONS)
    plain = [score.samples_right for score in result.plain.scores]
    taught = [score.samples_right for score in result.with_lessons.scores]
    expected = [4, plain[1], plain[2], 4, 4, plain[5]]
    assert taught == expected, "the same seeds without a lesson that changes the answer"
    shifts = [(b - a) / 4 for a, b in zip(plain, expected, strict=True)]
    assert sum(shifts) > 0
    assert result.difference["avg_at_k"] == bootstrap_interval(shifts, resamples=2000, seed=5)
    with_lesson = [shifts[i] for i in (0, 2, 3, 4)]
    assert result.taught_difference["avg_at_k"] == bootstrap_interval(with_lesson, resamples=2000, seed=5)
    greedy = [float(b.greedy_right) - float(a.greedy_right)
              for a, b in zip(result.plain.scores, result.with_lessons.scores, strict=True)]  # fmt: skip
    assert set(greedy) == {0.0}, "no greedy answer changes, which six tasks do not make certain"
    missed = 1 - 0.025 ** (1 / 6)
    assert result.difference["pass_at_1"] == Interval(0.0, -missed, missed)


def test_lessons_that_do_not_fit_the_context_are_left_out_and_counted() -> None:
    plain_tokens = len(TOKENIZER.apply_chat_template([{"role": "user", "content": QUESTIONS[4]}], tokenize=False)) + 20
    result, engine = measured(QUESTIONS, context_tokens=plain_tokens + 20)
    assert (result.taught, result.over_context, result.lessons_per_task) == (0, 4, 0.0)
    assert result.plain.scores == result.with_lessons.scores and result.taught_difference == {}
    assert not any("<notes>" in prompt for prompt in engine.prompts)
    assert result.difference["avg_at_k"].value == 0.0


def test_limit_takes_the_first_tasks() -> None:
    result, _ = measured(QUESTIONS, limit=2)
    assert (result.tasks, result.taught, result.plain.n) == (2, 1, 2)


def test_the_table_and_the_json_show_the_difference_in_points() -> None:
    result, _ = measured(QUESTIONS)
    console = Console(file=StringIO(), width=200, force_terminal=False)
    console.print(result.as_table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    shift = result.difference["avg_at_k"]
    assert f"{100 * shift.value:+.1f} [{100 * shift.low:+.1f}, {100 * shift.high:+.1f}] points" in text
    assert "4 of 6 tasks have lessons, 1.2 each. 6 prompts, 4 samples at T=0.6" in text
    saved = json.loads(result.to_json())
    assert saved["difference"]["avg_at_k"]["value"] == pytest.approx(shift.value) and saved["taught"] == 4
