"""From a dataset row to the question that judges see, and verdicts by a threshold."""

from __future__ import annotations

from typing import Any

import pytest

from mel_lite.seeds import prompt_hash
from mel_lite.types import Group, Verdict
from mel_lite.verify.judge import RewardJudge, answer_column, completion_text, group_of, judged_text

CHAT = [{"role": "user", "content": "1 + 1?"}]


@pytest.mark.parametrize(
    ("row", "column", "answer", "columns"),
    [
        ({"prompt": "1 + 1?", "answer": 2, "level": 3}, "answer", "2", {"level": 3}),
        ({"prompt": "1 + 1?", "solution": "2", "answer": "x"}, "solution", "2", {"answer": "x"}),
        ({"prompt": "1 + 1?", "answer": None}, "answer", None, {}),
        ({"prompt": "1 + 1?", "level": 3}, "answer", None, {"level": 3}),
        ({"prompt": CHAT, "answer": "2"}, None, None, {"answer": "2"}),
    ],
)
def test_a_row_becomes_a_question(
    row: dict[str, Any], column: str | None, answer: str | None, columns: dict[str, Any]
) -> None:
    assert group_of(row, column) == Group(row["prompt"], prompt_hash(row["prompt"]), (), answer, columns)


def test_the_answer_column_is_found_by_its_usual_names() -> None:
    assert answer_column(["prompt", "level", "solution"]) == "solution"
    assert answer_column(["prompt", "level"]) is None


def test_a_reward_is_judged_by_its_threshold() -> None:
    judge = RewardJudge(lambda groups, texts: [float(text) for text in texts], threshold=0.5)
    groups = [group_of({"prompt": "q"}, None)] * 4
    verdicts = judge(groups, ["0.5", "0.49", "nan", "2"])
    assert verdicts == [Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN, Verdict.RIGHT]


def test_the_text_of_a_completion_is_that_of_its_turns() -> None:
    assert completion_text("so 2") == "so 2"
    turns = [{"role": "assistant", "content": "so"}, {"role": "tool", "content": None}, {"content": 2}]
    assert completion_text(turns) == "so\n\n2"


def test_a_tools_result_is_no_answer() -> None:
    call, result = {"role": "assistant", "content": "I add."}, {"role": "tool", "content": "Answer: 2"}
    assert judged_text("so 2") == "so 2" and judged_text([call, result]) == ""
    assert judged_text([call, result, {"role": "assistant", "content": "It is 3."}]) == "It is 3."
    assert judged_text([call, {"content": 2}]) == "I add.\n2"
