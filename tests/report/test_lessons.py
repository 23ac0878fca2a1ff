"""A pair in the report: where its solutions part, the step that is quoted, and what is chosen for the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mel_lite.lessons.fork import find_fork
from mel_lite.lessons.store import ExperienceStore
from mel_lite.report.lessons import chosen, credit_strip, marked, view
from mel_lite.types import Status
from run_folders import WRONG, lesson


def test_marks_keep_every_character(tmp_path: Path) -> None:
    with ExperienceStore(tmp_path / "store.sqlite") as store:
        store.add([lesson(1)])
        seen = view(store.get(1))
    assert "".join(segment.text for segment in seen.wrong) == WRONG
    assert [(s.text, s.classes) for s in seen.wrong] == [
        ("First, 3 + 8 = 11.\n", "same"), ("Then, 11 - 2 = 8", "fork quoted"), (".", "fork"), ("\nAnswer: 8", ""),
    ]  # fmt: skip
    assert [(s.text, s.classes) for s in seen.right] == [
        ("First, 3 + 8 = 11.\n", "same"), ("Then, 11 - 2 = 9.", "fork"), ("\nAnswer: 9", ""),
    ]  # fmt: skip
    assert seen.quote == "The lesson quotes the step where they part (underlined)."
    assert seen.replay_line == "solved 1 of 1 with it, without it 0 of 1"
    assert seen.step == 2, "steps count from 1"


@pytest.mark.parametrize(
    ("text", "other", "segments"),
    [
        ("a\n", "a\nb", [("a", "same"), ("(ends here)", "fork"), ("\n", "")]),
        ("", "b", [("(ends here)", "fork")]),
        ("x" * 7000, "y", [("x" * 6000 + " [cut here]", "fork")]),
    ],
)
def test_where_a_solution_ends_or_is_cut_the_marks_say_so(
    text: str, other: str, segments: list[tuple[str, str]]
) -> None:
    found = marked(text, find_fork(text, other).right, None)
    assert [(s.text, s.classes) for s in found] == segments


def test_a_stored_quote_is_shown_and_an_older_row_is_searched(tmp_path: Path) -> None:
    with ExperienceStore(tmp_path / "store.sqlite") as store:
        store.add([lesson(1)])
        row = store.get(1)

    def quoted(row: Any) -> list[str]:
        return [segment.text for segment in view(row).wrong if "quoted" in segment.classes]

    assert quoted(replace(row, quote_start=7, quote_end=17)) == ["3 + 8 = 11"]
    assert quoted(replace(row, quote_start=None, quote_end=None)) == ["Then, 11 - 2 = 8"]
    assert "another step" in view(replace(row, quote_start=7, quote_end=17)).quote
    without = replace(row, bifurcation="At the end.", quote_start=None, quote_end=None)
    assert view(without).quote == "The lesson quotes no step of the wrong solution."


def test_kept_lessons_come_first_where_not_all_have_room(tmp_path: Path) -> None:
    statuses = [Status.KEPT, Status.UNPARSED] * 10
    with ExperienceStore(tmp_path / "store.sqlite") as store:
        store.add([lesson(i, status=status) for i, status in enumerate(statuses)])
        rows = store.list()
    assert [row.id for row in chosen(rows, 100)] == list(range(20, 0, -1))
    few = chosen(rows, 8)
    assert [row.id for row in few] == sorted((row.id for row in few), reverse=True) and len(few) == 8
    assert sum(row.status is Status.KEPT for row in few) == 6 and few[0].id == 20
    only_dropped = [replace(row, status=Status.LEAKED) for row in rows]
    assert len(chosen(only_dropped, 8)) == 8 and chosen(rows, 0) == []


def test_credit_is_marked_by_its_size_and_sign() -> None:
    strip = credit_strip([("a", 2.0), ("b", -1.0), ("c", 0.1), ("d\u202e", 0.0)])
    assert [(s.text, s.classes) for s in strip] == [("a", "up4"), ("b", "down2"), ("c", ""), ("d\ufffd", "")]
    assert credit_strip([("a", 0.0)])[0].classes == "" and credit_strip(()) == ()
