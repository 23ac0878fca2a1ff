"""A pair in the report: where its solutions part, the step that is quoted, and what is chosen for the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mel_lite.lessons.fork import find_fork
from mel_lite.lessons.store import Effect, ExperienceStore, TokenCredit
from mel_lite.report.credit import strips, strips_of
from mel_lite.report.lessons import chosen, marked, view
from mel_lite.types import Status, Verdict
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


def credit(**changes: Any) -> TokenCredit:
    values: dict[str, Any] = {
        "step": 1, "rollout_index": 6, "way": "credit", "verdict": Verdict.WRONG, "effect": Effect.FACTOR,
        "tokens": ("a", "b", "c", "d\u202e", "e"), "shift_nats": (3.5, -1.0, 0.29, 0.09, -0.1),
        "effects": (1.9, 0.45, 1.1, 1.0, 1.0), "all_tokens": 5,
    }  # fmt: skip
    return TokenCredit(**values | changes)


def test_credit_is_marked_by_its_size_and_sign() -> None:
    (strip,) = strips([credit()])
    assert [(t.number, t.text, t.mark) for t in strip.tokens] == [
        (1, "a", "up4"), (2, "b", "down3"), (3, "c", "up1"), (4, "d\ufffd", ""), (5, "e", "down1"),
    ]  # fmt: skip
    assert strip.tokens[0].title == "+3.50 nats, advantage \u00d7 1.90" and strip.cut == ""
    assert [token.number for token in strip.strongest] == [1, 2, 3, 5, 4]
    added, taught = strips(
        [credit(effect=Effect.ADDED), credit(effect=Effect.TAUGHT, effects=(1.0, 0.0, 1.0, 1.0, 0.0))]
    )
    assert added.tokens[1].effect == "advantage +0.45"
    assert [token.effect for token in taught.tokens[:2]] == ["taught", "not taught"]


def test_a_long_strip_is_cut_and_says_so() -> None:
    (strip,) = strips([credit(tokens=("a",) * 500, shift_nats=tuple(i / 100 for i in range(500)), effects=(1.0,) * 500,
                              all_tokens=1200)])  # fmt: skip
    assert len(strip.tokens) == 400 and strip.cut == "the first 400 of 1,200 tokens"
    assert [token.number for token in strip.strongest] == list(range(400, 380, -1))


def test_a_lesson_has_the_credit_of_its_own_rollouts(tmp_path: Path) -> None:
    with ExperienceStore(tmp_path / "store.sqlite") as store:
        store.add([lesson(0)])
        rows = [credit(rollout_index=i, step=step) for step, i in ((1, 4), (1, 6), (1, 5), (2, 6))]
        store.add_credit([rows[0], rows[1], replace(rows[1], way="distill"), *rows[2:]])
        row = store.get(1)
        found = view(row, strips_of(row, store)).credit
    assert [(strip.way, strip.all_tokens) for strip in found] == [("credit", 5), ("distill", 5), ("credit", 5)]
    assert view(row).credit == ()
