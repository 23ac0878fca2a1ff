"""Meta-experiences and rollouts in a terminal: contents, width, and that model text cannot control it."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mel_lite.lessons.store import ExperienceRow, ExperienceStore
from mel_lite.report.credit import strips
from mel_lite.report.rollouts import RolloutRow
from mel_lite.report.terminal import credit_text, experience_page, experiences_list, plain, rollout_page, rollouts_list
from mel_lite.types import Span, Status
from run_folders import HOSTILE, WRONG, lesson, token_credit


def shown(renderable: Any, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row_of(tmp_path: Path, made: Any) -> ExperienceRow:
    with ExperienceStore(tmp_path / "s.sqlite") as store:
        return store.get(store.add([made])[0])


ROLLOUT = RolloutRow(
    "3.1", 3, 1, "a", f"What?{HOSTILE}", "wrong", 0.0, -1.25, f"[bold]x[/]{HOSTILE}", {"f": 0.0, "n": HOSTILE}
)


def test_the_analysis_is_shown_once(tmp_path: Path) -> None:
    row = row_of(tmp_path, lesson(1))
    row = replace(row, analysis=f"## Bifurcation\n{row.bifurcation}\n## Heuristics\n{row.heuristic}")
    text = shown(experience_page(row))
    assert text.count("Rule-1: count down.") == 1 and text.count("which is the slip") == 1
    assert "as sampled" not in text
    unparsed = row_of(tmp_path, lesson(2, status=Status.UNPARSED))
    assert shown(experience_page(unparsed)).count("the analysis as sampled") == 1


def test_the_page_of_an_experience_shows_the_step_it_quotes_and_its_score(tmp_path: Path) -> None:
    page = shown(experience_page(row_of(tmp_path, replace(lesson(1), quote=Span(0, 10), shift_nats=0.0))))
    assert WRONG[:10] in page.split("wrong step it quotes")[1].splitlines()[1]
    assert "+0.00 nats" in page.split("lift of the right rollouts over the wrong ones")[1]
    page = shown(experience_page(row_of(tmp_path, lesson(1))))
    assert "wrong step it quotes" not in page and "lift of the right" not in page


@pytest.mark.parametrize("width", [24, 40, 69, 70, 200])
def test_every_view_fits_its_terminal(tmp_path: Path, width: int) -> None:
    row = row_of(tmp_path, lesson(1, hostile=True))
    for view in (
        experiences_list([row], width), experience_page(row), rollouts_list([ROLLOUT], width), rollout_page(ROLLOUT),
    ):  # fmt: skip
        text = shown(view, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "\x1b" not in text and "\x00" not in text and "\u202e" not in text
    block = "\n  What is" in shown(experiences_list([row_of(tmp_path, lesson(1))], width), width)
    assert block == (width < 70), "blocks where a table has no room"


def test_a_rollout_is_shown_with_its_figures() -> None:
    page = shown(rollout_page(ROLLOUT), 200)
    assert "row 1 of step 3" in page and "verdict wrong, reward 0, advantage -1.25" in page and "[bold]x[/]" in page
    bare = replace(ROLLOUT, verdict=None, reward=None, advantage=None, text="", columns={})
    page = shown(rollout_page(bare), 200)
    assert "(empty)" in page and "figures" not in page and "other columns" not in page


def test_token_credit_is_shown_with_its_largest_numbers(tmp_path: Path) -> None:
    row, credit = row_of(tmp_path, lesson(0)), strips(token_credit(1))
    for page in (experience_page(row, credit), rollout_page(ROLLOUT, credit)):
        text = shown(page, 200)
        assert text.count("solution, read by credit, the first 10 of 20 tokens") == 2
        assert "First, 3 + 8 = 11." in text and "=: +4.00 nats, advantage \u00d7 2.00" in text
        assert "\x1b" not in text and "\u202e" not in text
    strip = credit_text(credit[0])
    styles = [str(span.style) for span in strip.spans]
    assert styles[1:4] == ["bold dodger_blue1", "black on dodger_blue1", "bold black on dodger_blue1"]
    assert "token credit" not in shown(experience_page(row))


def test_model_text_has_neither_markup_nor_control_characters() -> None:
    assert plain("a\x1b[31mb\x00\u202ec\nd").plain == "a\ufffd[31mb\ufffd\ufffdc\nd"
    assert plain("abcdef", 4).plain == "abc\N{HORIZONTAL ELLIPSIS}"
