"""The retrieval benchmark: its measures by hand, its notion of right, and that the committed results are its own."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mel_lite.types import BankLesson

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """benchmarks/retrieval.py, imported as when it is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("retrieval")


def test_precision_recall_and_chance_by_hand(bench: Any) -> None:
    lessons = tuple(BankLesson(i, "r", "q", 1.0, 1, False, 0) for i in range(10))
    questions = (
        ("ab", frozenset({0, 1})),
        ("c", frozenset({2})),
        ("none", frozenset()),
        ("d", frozenset({3, 4, 5, 6})),
    )
    found = {"ab": [0, 9, 1, 8], "c": [], "d": [3, 4]}

    def retrieval(question: str, bank: Sequence[BankLesson]) -> list[BankLesson]:
        return [bank[i] for i in found[question]]

    measured = bench.measure(bench.Case("by hand", lessons, questions), retrieval)
    assert (measured["lessons"], measured["questions"], measured["without_match"]) == (10, 3, 1)
    assert measured["lessons_found"] == 2.0
    at_1, at_3, at_8 = measured["precision"]
    assert at_1["value"] == pytest.approx((1 + 0 + 1) / 3) and at_3["value"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert at_8["value"] == pytest.approx((0.5 + 0 + 1) / 3) and at_8["k"] == 8
    assert at_8["random"] == at_1["random"] == pytest.approx((0.2 + 0.1 + 0.4) / 3)
    assert at_8["better"]["value"] == pytest.approx((0.3 - 0.1 + 0.6) / 3)
    assert at_8["better"]["low"] == pytest.approx(-0.1) and at_8["better"]["high"] == pytest.approx(0.6)
    assert measured["recall"]["value"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert measured["recall"]["random"] == pytest.approx((0.4 + 0 + 0.2) / 3)


def test_a_rule_is_right_for_the_tasks_with_its_word(bench: Any) -> None:
    case = bench.demo(12)
    assert len(case.lessons) == 12 and len(case.questions) == 100
    for question, right in case.questions:
        for lesson in case.lessons:
            word = lesson.heuristic.removeprefix("- ").partition(":")[0].lower()
            assert (lesson.id in right) == (word in question.replace("?", " ").split())


def test_the_committed_results_are_those_of_the_code(bench: Any) -> None:
    committed = json.loads((BENCHMARKS / "results" / "retrieval.json").read_text())
    measured = bench.run()
    assert measured["versions"] == committed["versions"], "run python benchmarks/retrieval.py with the new versions"
    for ours, theirs in zip(measured["cases"], committed["cases"], strict=True):
        assert ours["case"] == theirs["case"] and ours["lessons_found"] == pytest.approx(theirs["lessons_found"])
        for a, b in zip([*ours["precision"], ours["recall"]], [*theirs["precision"], theirs["recall"]], strict=True):
            assert a["value"] == pytest.approx(b["value"]) and a["random"] == pytest.approx(b["random"])
            assert a["better"] == pytest.approx(b["better"])
            assert a["better"]["low"] > 0
    assert measured["foreign"] == committed["foreign"]
