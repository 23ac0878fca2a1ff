"""The picture of a run shows what was captured, and loads nothing from a server."""

from __future__ import annotations

import html
import xml.etree.ElementTree as ET
from pathlib import Path

from run_picture import PICTURE, drawn, shortened

LOG = ["\x1b[?25l\x1b[1mdemo\x1b[0m learns", "2/3 | reward 0.09", "3/3 | reward 0.72", "took 4 min"]


def text_of(svg: str) -> str:
    """What the picture shows, one space for each of its kinds of space."""
    return " ".join(html.unescape("".join(ET.fromstring(svg).itertext())).split())


def test_lines_are_left_out_visibly() -> None:
    assert shortened([*LOG], []) == LOG
    assert shortened([*LOG], ["3-4", "1-1"]) == [
        "\x1b[2m[1 line left out]\x1b[0m", LOG[1], "\x1b[2m[2 lines left out]\x1b[0m"
    ]  # fmt: skip


def test_the_picture_has_the_text_and_no_links() -> None:
    svg = drawn([*LOG], "make train")
    assert "make train" in text_of(svg) and "demo learns 2/3 | reward 0.09 3/3 | reward 0.72 took 4 min" in text_of(svg)
    assert "url(http" not in svg and "@font-face" not in svg and "[?25l" not in svg


def test_the_committed_picture_is_of_a_whole_run() -> None:
    shown = text_of(Path(PICTURE).read_text(encoding="utf-8"))
    for part in ("step 3/3 |", "bifurcation:", "Pass@1 (greedy)", "merged vs adapter", "lines left out"):
        assert part in shown, part
