"""Find the wrong step that an analysis quotes in the wrong solution."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from mel_lite.lessons.fork import Unit, find_pieces
from mel_lite.types import Span

MIN_CHARS = 4
"""Fewest characters of a quote, without blanks and markup; a shorter one must be a whole line."""
MAX_QUOTES = 64
"""Quotes of an analysis that are looked for."""

_QUOTED = re.compile(r"(?<!`)(`{1,3})(?!`)(?P<code>[^`]+)\1|\"(?P<plain>[^\"\n]+)\"|\u201c(?P<curly>[^\u201d]+)\u201d|"
                     r"\u00ab(?P<angle>[^\u00bb]+)\u00bb|(?<!\w)['\u2018](?P<single>[^\n'\u2019]+)['\u2019](?!\w)|"
                     r"^[ \t]*>[ \t]*(?P<block>[^\n]+)", re.M)  # fmt: skip
_ELLIPSIS = re.compile(r"(?:\.{3,}|\u2026)\s*$|^\s*(?:\.{3,}|\u2026)")
_LABEL = re.compile(r"(?:[-*\u2022+]|\(?\d{1,3}[.)]|(?:step|line)\s+\d{1,3}\s*[:.)])\s+", re.I)
_SKIPPED = re.compile(
    r"\s+|\\[,;:!> ]|\\[()\[\]]|[`$\"{}\u201c\u201d\u00ab\u00bb\u200b\ufeff]|(?m:^[ \t]*[#>]+(?=\s))|"
    r"\\(?:left|right|q?quad|displaystyle|[bB]igg?[lr]?|mathrm|mathbf|text|textbf)(?![A-Za-z])"
)
_DECIMAL = re.compile(r"\d[.,]\d")
_STARS = re.compile(r"[*_]+")
_COMMANDS = (
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), "\\frac"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
)
_ALIKE = str.maketrans("\u2212\u2013\u2014\u00d7\u00b7\u22c5\u00f7\u2018\u2019", "---***/''")


@dataclass(frozen=True, slots=True)
class _Normal:
    """A text without blanks and markup, in one case, and the span of the original behind each of its characters."""

    original: str
    text: str
    spans: tuple[Span, ...]

    def find(self, wanted: str) -> Iterator[Span]:
        """Yield the spans of the original whose normalized text is `wanted`, where no word or number is cut."""
        at = self.text.find(wanted) if wanted else -1
        while at >= 0:
            span = Span(self.spans[at].start, self.spans[at + len(wanted) - 1].end)
            if _is_whole(self.original, span):
                yield span
            at = self.text.find(wanted, at + 1)


def _normalize(text: str) -> _Normal:
    characters: list[str] = []
    spans: list[Span] = []
    at = 0
    while at < len(text):
        end, shown = _step(text, at)
        for character in shown:
            characters.append(character)
            spans.append(Span(at, end))
        at = end
    return _Normal(text, "".join(characters), tuple(spans))


def _step(text: str, at: int) -> tuple[int, str]:
    """Return the end of the piece of text at `at`, and its normalized form."""
    if skipped := _SKIPPED.match(text, at):
        return skipped.end(), ""
    if (stars := _STARS.match(text, at)) and _is_emphasis(text, stars.start(), stars.end()):
        return stars.end(), ""
    if text[at] == "\\":
        for command, shown in _COMMANDS:
            if found := command.match(text, at):
                return found.end(), shown
    return at + 1, unicodedata.normalize("NFKC", text[at].translate(_ALIKE)).casefold()


def _is_emphasis(text: str, start: int, end: int) -> bool:
    """Return True for stars or underscores at the edge of a word, not between two operands."""
    before, after = text[start - 1 : start], text[end : end + 1]
    return _is_edge(before) != _is_edge(after)


def _is_edge(character: str) -> bool:
    return not character or character.isspace() or character in ".,;:!?()[]\"'"


def _is_whole(text: str, span: Span) -> bool:
    """Return True when the span begins and ends at the edge of a word or number."""
    before, after = text[max(0, span.start - 2) : span.start], text[span.end : span.end + 2]
    first, last = text[span.start], text[span.end - 1]
    if (first.isalnum() and before[-1:].isalnum()) or (last.isalnum() and after[:1].isalnum()):
        return False
    return not (_DECIMAL.fullmatch(before + first) or _DECIMAL.fullmatch(last + after))


def locate_quote(bifurcation: str, wrong_text: str, *, fork: Span | None = None, mark: str = "> ") -> Span | None:
    """Return the span of `wrong_text` that the bifurcation quotes, or None.

    A quote is text in backticks or quotation marks, a line after `>`, or a whole line of `wrong_text`. It is looked for
    exactly, then without regard to blanks, case, markup and LaTeX spacing. Of several, the first in the bifurcation
    that does not end before `fork` counts, then the first of all.

    Args: `mark` may stand before a quote: it was copied from the prompt.
    """
    wrong = _normalize(wrong_text)
    lines = {span: _normalize(span.of(wrong_text)).text for span in find_pieces(wrong_text, Unit.LINE)}
    whole = set(lines.values())
    spans = []
    for quote in _quotes(bifurcation, mark):
        normal = _normalize(quote).text
        if len(normal) >= MIN_CHARS or normal in whole:
            spans.append(list(_exact(quote, wrong_text)) or list(wrong.find(normal)))
    spans.append(list(_whole_lines(bifurcation, wrong_text, lines)))
    found = [span for each in spans for span in each]
    return next((span for span in found if fork is None or span.end > fork.start), found[0] if found else None)


def _quotes(text: str, mark: str) -> Iterator[str]:
    """Yield quoted pieces in order, without the fork's mark and dots that stand for omitted text."""
    for _, match in zip(range(MAX_QUOTES), _QUOTED.finditer(text), strict=False):
        quote = next(group for name, group in match.groupdict().items() if group is not None).strip()
        yield _ELLIPSIS.sub("", quote.removeprefix(mark.strip()).strip().strip("`")).strip()


def _exact(quote: str, text: str) -> Iterator[Span]:
    at = text.find(quote) if quote else -1
    while at >= 0:
        if _is_whole(text, Span(at, at + len(quote))):
            yield Span(at, at + len(quote))
        at = text.find(quote, at + 1)


def _whole_lines(bifurcation: str, wrong_text: str, lines: dict[Span, str]) -> Iterator[Span]:
    """Yield the lines, or lines without their number or label, that the bifurcation contains."""
    said = _normalize(bifurcation)
    for span, normal in lines.items():
        label = _LABEL.match(wrong_text, span.start, span.end)
        for start, wanted in ((span.start, normal), (label.end(), "") if label else (span.start, "")):
            wanted = wanted or _normalize(wrong_text[start : span.end]).text
            if len(wanted) >= MIN_CHARS and any(said.find(wanted)):
                yield Span(start, span.end)
                break


__all__ = ["locate_quote"]
