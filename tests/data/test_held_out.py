"""Tasks held out of training: which, how many, and none that is trained on."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from mel_lite.data.held_out import hold_out, question_key, trained_too


def tasks(count: int, *, repeats: int = 1, seed: int | None = None) -> Dataset:
    rows = [{"prompt": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(count)] * repeats
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def questions(dataset: Any) -> set[str]:
    return set(dataset["prompt"])


def test_a_tenth_is_held_out_and_no_copy_of_it_is_trained_on() -> None:
    every = tasks(250, repeats=3)
    train, held_out = hold_out(every, limit=None, least_left=8)
    assert held_out is not None
    assert (len(train), len(held_out)) == (225 * 3, 25)
    assert not questions(train) & questions(held_out)
    assert questions(train) | questions(held_out) == questions(every)


def test_the_choice_depends_on_the_questions_alone() -> None:
    _, one = hold_out(tasks(300), limit=None, least_left=8)
    _, other = hold_out(tasks(300, seed=3), limit=None, least_left=8)
    assert one is not None and other is not None
    assert questions(one) == questions(other) and len(one) == 30
    chosen = [int(prompt.split()[2]) for prompt in one["prompt"]]
    assert max(chosen) - min(chosen) > 200, "spread over the data, not its beginning"


def test_the_limit_bounds_it_and_a_smaller_limit_chooses_some_of_the_same() -> None:
    _, hundred = hold_out(tasks(3000), limit=None, least_left=8)
    _, seven = hold_out(tasks(3000), limit=7, least_left=8)
    assert hundred is not None and seven is not None
    assert (len(hundred), len(seven)) == (100, 7) and questions(seven) < questions(hundred)


def test_too_few_tasks_are_all_trained_on() -> None:
    for few, least_left in ((tasks(99), 8), (tasks(60, repeats=2), 8), (tasks(100), 91)):
        train, held_out = hold_out(few, limit=None, least_left=least_left)
        assert held_out is None and len(train) == len(few)
    train, held_out = hold_out(tasks(100), limit=None, least_left=90)
    assert held_out is not None and (len(train), len(held_out)) == (90, 10)


def test_questions_are_compared_without_system_turns_case_and_spacing() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What  is 2 plus\n1?"}]
    assert question_key(turns) == question_key("what is 2 plus 1?") != question_key("What is 3 plus 1?")
    held_out = Dataset.from_list([{"prompt": text, "answer": "1"} for text in ("what is 3 PLUS 1?", "What is 9000?")])
    assert trained_too(tasks(5), held_out) == 1
    assert trained_too(tasks(3), held_out) == 0
