"""The terminal browser, driven by keys through Textual's pilot: what is on the screen after each."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.errors import ConfigError, StoreError
from mel_lite.lessons.store import ExperienceStore
from mel_lite.report import browser
from mel_lite.report.browser import Browser
from mel_lite.types import Status
from run_folders import lesson as made_lesson
from run_folders import make_run

Play = Callable[[Browser, Pilot[None]], Awaitable[None]]


def play(run: Path, keys: Play, size: tuple[int, int] = (120, 40)) -> None:
    async def main() -> None:
        opened = Browser(run)
        async with opened.run_test(size=size) as pilot:
            await pilot.pause()
            await keys(opened, pilot)

    asyncio.run(main())


def text(opened: Browser, name: str) -> str:
    return str(opened.query_one(f"#{name}", Static).content)


def listed(opened: Browser) -> list[str]:
    table = opened.query_one("#rows", DataTable)
    return [" ".join(str(cell) for cell in table.get_row_at(i)[:3]) for i in range(table.row_count)]


async def press(pilot: Pilot[None], *keys: str) -> None:
    await pilot.press(*keys)
    await pilot.pause()


def test_the_newest_is_on_top_with_its_pair_and_marks(tmp_path: Path) -> None:
    async def keys(opened: Browser, pilot: Pilot[None]) -> None:
        assert listed(opened) == [
            "5 5 kept", "4 4 unparsed", "3 3 leaked", "2 2 replay failed", "1 1 kept",
        ]  # fmt: skip
        assert text(opened, "state") == "run \u00b7 5 of 5 \u00b7 verdict: all \u00b7 step: all \u00b7 task: all"
        assert text(opened, "head") == "#5, step 5: kept\nWhat is 3 + 8 - 2?\nreference answer: 9"
        wrong = opened.query_one("#wrong", Static)
        fork = "\u2500\u2500 here they part \u2500\u2500\n"
        assert text(opened, "wrong") == f"First, 3 + 8 = 11.\n{fork}Then, 11 - 2 = 8.\nAnswer: 8"
        styles = {str(wrong.content)[s.start : s.end]: str(s.style) for s in wrong.content.spans}  # type: ignore[union-attr]
        assert styles["First, 3 + 8 = 11.\n"] == "dim"
        assert styles["Then, 11 - 2 = 8"] == "bold reverse underline" and styles["."] == "bold reverse"
        assert (wrong.border_title, opened.query_one("#right", Static).border_title) == (
            "wrong (rollout 6)", "right (rollout 4)",
        )  # fmt: skip
        assert "Heuristic\nRule-4: count down." in text(opened, "lesson")
        assert "solved 1 of 1 with it, without it 0 of 1: right" in text(opened, "lesson")
        await press(pilot, "down", "j", "k", "j", "down", "j")
        assert text(opened, "head").startswith("#1, step 1: kept")
        assert "before its update 0.412, after 0.387" in text(opened, "lesson")
        await press(pilot, "g")
        assert text(opened, "head").startswith("#5,")

    play(make_run(tmp_path / "run", lessons=5), keys)


@pytest.mark.slow
def test_filters_combine_and_escape_shows_all(tmp_path: Path) -> None:
    async def keys(opened: Browser, pilot: Pilot[None]) -> None:
        await press(pilot, "v")
        assert listed(opened) == ["5 5 kept", "1 1 kept"]
        assert "2 of 6 \u00b7 verdict: kept \u00b7 step: all" in text(opened, "state")
        await press(pilot, "s", "5", "enter")
        assert listed(opened) == ["5 5 kept"] and "step: 5" in text(opened, "state")
        await press(pilot, "slash", *"jkbv", "space", "q", "enter")
        assert listed(opened) == [] and "task: jkbv q" in text(opened, "state")
        assert text(opened, "head") == "No meta-experience matches. Press escape to see all."
        assert opened.query_one("#pair").display is False
        await press(pilot, "slash", "escape")
        assert "task: jkbv q" in text(opened, "state"), "escape leaves the entry line first"
        await press(pilot, "escape")
        assert len(listed(opened)) == 6 and "task: all" in text(opened, "state")
        await press(pilot, "slash", *"WHAT", "space", "8", "enter")
        assert len(listed(opened)) == 6
        await press(pilot, "v", "v")
        assert listed(opened) == ["4 4 unparsed"] and "verdict: unparsed" in text(opened, "state")

    play(make_run(tmp_path / "run", lessons=6), keys)


def test_rows_appear_while_the_run_writes_and_go_when_it_resumes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lessons=0)

    async def keys(opened: Browser, pilot: Pilot[None]) -> None:
        assert text(opened, "head").startswith("No meta-experience yet.") and "0 of 0" in text(opened, "state")
        with ExperienceStore(run / "experiences.sqlite") as store:
            store.add([made_lesson(0), made_lesson(1)])
            opened.read_new()
            await pilot.pause()
            assert listed(opened) == ["2 2 kept", "1 1 kept"] and "2 of 2" in text(opened, "state")
            await press(pilot, "down")
            store.add([made_lesson(2, status=Status.LEAKED)])
            opened.read_new()
            await pilot.pause()
            assert len(listed(opened)) == 3 and text(opened, "head").startswith("#1,"), "the cursor stays on its row"
            store.truncate_after(2)
            opened.read_new()
            await pilot.pause()
            assert listed(opened) == ["2 2 kept", "1 1 kept"] and text(opened, "head").startswith("#1,")

    play(run, keys)


@pytest.mark.parametrize(("width", "side_by_side"), [(30, False), (99, False), (100, True), (200, True)])
def test_the_pair_is_side_by_side_where_there_is_room(tmp_path: Path, width: int, side_by_side: bool) -> None:
    async def keys(opened: Browser, pilot: Pilot[None]) -> None:
        wrong, right = (opened.query_one(f"#{name}").region for name in ("wrong", "right"))
        assert (wrong.y == right.y) is side_by_side and (wrong.x == right.x) is not side_by_side
        assert wrong.width + right.width <= width if side_by_side else wrong.right <= width
        assert [key.split()[0] for key in text(opened, "help").split(" \u00b7 ")] == [
            "\u2191\u2193", "space/b", "v", "s", "/", "esc", "g", "z", "c", "q",
        ]  # fmt: skip
        shown = opened.query_one("#help").region
        assert shown.width == width and shown.bottom == 24, "the help line is on the screen"
        await press(pilot, "z")
        assert opened.query_one("#rows").display is False
        assert opened.query_one("#detail").region.height > 10
        await press(pilot, "space")
        await press(pilot, "z")
        assert opened.query_one("#rows").display is True

    play(make_run(tmp_path / "run", lessons=2), keys, size=(width, 24))


def test_token_credit_takes_the_place_of_the_marks(tmp_path: Path) -> None:
    async def keys(opened: Browser, pilot: Pilot[None]) -> None:
        await press(pilot, "c")
        wrong = opened.query_one("#wrong", Static)
        assert text(opened, "wrong").startswith(
            "credit: blue is likelier with the notes, orange less likely\nFirst, 3 + 8 = 11.\n"
        )
        assert "[the first 10 of 20 tokens]" in text(opened, "wrong") and "\x1b" not in text(opened, "wrong")
        styles = {str(wrong.content)[s.start : s.end]: str(s.style) for s in wrong.content.spans}  # type: ignore[union-attr]
        assert (styles[" ="], styles[" 11"]) == ("bold black on dodger_blue1", "underline dark_orange")
        await press(pilot, "c")
        assert "here they part" in text(opened, "wrong")

    play(make_run(tmp_path / "run", lessons=2, credit=True), keys)


def test_hostile_texts_are_shown_as_text(tmp_path: Path) -> None:
    async def keys(opened: Browser, pilot: Pilot[None]) -> None:
        for name in ("head", "wrong", "right", "lesson"):
            shown = text(opened, name)
            assert "<script>document.title='owned'</script>" in shown
            assert "\x1b" not in shown and "\x00" not in shown and "\u202e" not in shown

    play(make_run(tmp_path / "run", lessons=1, hostile=True), keys)


def test_a_row_damaged_while_it_is_open_is_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lessons=2)

    async def keys(opened: Browser, pilot: Pilot[None]) -> None:
        with sqlite3.connect(run / "experiences.sqlite") as db:
            db.execute("UPDATE experiences SET leak_reasons = '[' WHERE id = 1")
        await press(pilot, "down")
        assert "a row is damaged" in text(opened, "head") and "\n" not in text(opened, "head")
        with sqlite3.connect(run / "experiences.sqlite") as db:
            db.execute("DROP TABLE experiences")
        opened.read_new()
        await pilot.pause()
        assert "no such table" in text(opened, "state")

    play(run, keys)


def test_what_cannot_be_opened_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        browser.browse(tmp_path)
    (tmp_path / "experiences.sqlite").write_text("no database at all, but long enough for a header")
    with pytest.raises(StoreError, match="file is not a database"):
        browser.browse(tmp_path)
    done = CliRunner().invoke(app, ["experiences", "browse", str(tmp_path)])
    assert isinstance(done.exception, ConfigError) and "needs a terminal" in str(done.exception)


def test_without_textual_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "textual"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "textual", None)
    monkeypatch.delitem(sys.modules, "mel_lite.report.browser")
    done = CliRunner().invoke(app, ["experiences", "browse"])
    assert isinstance(done.exception, ConfigError) and "Run `pip install textual`" in str(done.exception)
