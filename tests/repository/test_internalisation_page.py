"""docs/internalisation.md against the code: every way, and every option with its default and values."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from mel_lite.lessons.internalise import INTERNALISATIONS
from mel_lite.lessons.internalise.distill import DistillForm, TeacherReader, TokenMask
from mel_lite.lessons.internalise.notes import LessonsPerPrompt, NoteSource, TaughtRows
from mel_lite.types import Choice

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "internalisation.md").read_text(encoding="utf-8")
VALUES: dict[str, dict[str, type[Choice]]] = {
    "distill": {
        "context": NoteSource, "form": DistillForm, "per_prompt": LessonsPerPrompt, "reader": TeacherReader,
        "mask": TokenMask, "rows": TaughtRows,
    },
    "credit": {"rows": TaughtRows},
}  # fmt: skip


def rows(section: str) -> dict[str, tuple[str, str]]:
    """Default and text of each option in the table of a section."""
    text = re.split(rf"^## `{section}`.*$", PAGE, flags=re.MULTILINE)[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.*) \|$", text, flags=re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in found}


@pytest.mark.parametrize("way", VALUES)
def test_the_page_has_every_option_with_its_default_and_values(way: str) -> None:
    parameters = inspect.signature(INTERNALISATIONS[way]).parameters
    defaults = {name: each.default for name, each in parameters.items()}
    shown = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in defaults.items()}
    assert {name: default for name, (default, _) in rows(way).items()} == shown
    for name, choices in VALUES[way].items():
        named = set(re.findall(r"`([\w+]+)`", rows(way)[name][1]))
        assert set(map(str, choices)) <= named, name


def test_the_page_names_every_way() -> None:
    table = PAGE.split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) - {"internalisation"} == set(INTERNALISATIONS)
