"""Draw docs/images/run.svg from the captured terminal output of a real run: `python benchmarks/run_picture.py LOG`.

Capture it in the size of the picture, with colors and without the progress bar:

    TTY_COMPATIBLE=1 TTY_INTERACTIVE=0 COLUMNS=120 mel-lite train --gpu cpu > LOG

The text is what the run printed. Line ranges that `--leave-out` names are replaced by a line that says so.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "run.svg"
WIDTH = 120
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def shortened(lines: list[str], ranges: list[str]) -> list[str]:
    """Replace each range `first-last` (from 1, both included) by one line that gives the number of lines left out."""
    for text in sorted(ranges, key=lambda each: -int(each.partition("-")[0])):
        first, last = (int(part) for part in text.split("-"))
        count = last - first + 1
        lines[first - 1 : last] = [f"\x1b[2m[{count} {'line' if count == 1 else 'lines'} left out]\x1b[0m"]
    return lines


def drawn(lines: list[str], title: str) -> str:
    """Return the lines as an SVG. The fonts of a web server are not linked: a viewer takes its own monospaced font."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=True)
    return FONTS.sub("", console.export_svg(title=title, theme=MONOKAI))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="FIRST-LAST")
    given = parser.parse_args()
    lines = [line.rstrip() for line in given.log.read_text(encoding="utf-8").splitlines()]
    PICTURE.write_text(drawn(shortened(lines, given.leave_out), "make train"), encoding="utf-8")


if __name__ == "__main__":
    main()
