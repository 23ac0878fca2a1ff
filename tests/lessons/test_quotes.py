"""The quoted wrong step is found in the wrong solution, in the many ways small models quote."""

from __future__ import annotations

import pytest

from mel_lite.lessons.fork import find_fork
from mel_lite.lessons.quotes import locate_quote
from mel_lite.types import Span

WRONG = "Start with 7.\n7 + 5 = 12\n12 - 3 = 8\nAnswer: 8"
RIGHT = "Start with 7.\n7 + 5 = 12\n12 - 3 = 9\nAnswer: 9"
LATEX = "Thus $\\dfrac{1}{2} \\times 4\\,=\\,2$.\nThen **x_1 = 3*4** follows.\nSo x=12.5 holds"


@pytest.mark.parametrize(
    ("said", "wrong", "found"),
    [
        ("It errs at `12 - 3 = 8`.", WRONG, "12 - 3 = 8"),
        ('It errs at "12 - 3 = 8".', WRONG, "12 - 3 = 8"),
        ("It errs at \u201c12 - 3 = 8\u201d.", WRONG, "12 - 3 = 8"),
        ("It errs at '12 - 3 = 8'.", WRONG, "12 - 3 = 8"),
        ("It errs here:\n> 12 - 3 = 8\nwhich is off.", WRONG, "12 - 3 = 8"),
        ("It errs at `> 12 - 3 = 8`.", WRONG, "12 - 3 = 8"),
        ("It errs at ```\n12 - 3 = 8\n```.", WRONG, "12 - 3 = 8"),
        ("It errs at `12-3=8`.", WRONG, "12 - 3 = 8"),
        ("It errs at `12 \u2212 3 = 8`.", WRONG, "12 - 3 = 8"),
        ("It errs at `ANSWER:  8`", WRONG, "Answer: 8"),
        ("It writes 12 - 3 = 8, which is off.", WRONG, "12 - 3 = 8"),
        ("`12 - 3 = 9` is right, `12 - 3 = 8` is not.", WRONG, "12 - 3 = 8"),
        ("After `7 + 5 = 12` it writes `12 - 3 = 8`.", WRONG, "12 - 3 = 8"),
        ("After `7 + 5 = 12` it goes astray.", WRONG, "7 + 5 = 12"),
        ("It errs at `12 - 3 = ...`.", WRONG, "12 - 3 ="),
        ("It errs at `2 - 3 = 8`.", WRONG, None),
        ("It errs at `12 - 3`, then at `Answer: 81`.", WRONG, "12 - 3"),
        ("It errs at `12`.", WRONG, None),
        ("The wrong one is careless.", WRONG, None),
        ("", WRONG, None),
        ("It errs at `12 - 3 = 8`.", "", None),
        ("It says `8`.", "7 + 5\n8", "8"),
        (
            "It says $\\frac{1}{2}\\cdot 4 = 2$, in words `\\frac12 \\times 4 = 2`.",
            LATEX,
            "\\dfrac{1}{2} \\times 4\\,=\\,2",
        ),
        ("See `x_1 = 3 * 4`.", LATEX, "x_1 = 3*4"),
        ("See `x_1 = 34`.", LATEX, None),
        ("See `So x = 12`.", LATEX, None),
        ("See `So x = 12.5`.", LATEX, "So x=12.5"),
        ("It says 2 plus 2 is 5.", "1. First.\n2. 2 plus 2 is 5\n", "2 plus 2 is 5"),
        ("\u00dcber `STRASSE = 4`", "die Stra\u00dfe = 4 \U0001f600", "Stra\u00dfe = 4"),
    ],
)
def test_where_the_quote_is(said: str, wrong: str, found: str | None) -> None:
    fork = find_fork(RIGHT, wrong).wrong if wrong == WRONG else None
    span = locate_quote(said, wrong, fork=fork)
    assert (span and span.of(wrong)) == found


def test_of_equal_lines_the_one_after_the_fork_counts() -> None:
    wrong = "x = 4\ny = 2\nx = 4\nso 4"
    fork = find_fork("x = 4\ny = 2\nx = 5\nso 5", wrong).wrong
    assert locate_quote("`x = 4`", wrong) == Span(0, 5)
    assert locate_quote("`x = 4`", wrong, fork=fork) == Span(12, 17)
