"""The fork of a pair: where its two solutions part, as text spans and as tokens, and the mark that shows it.

Small models seldom find the fork in two long solutions. The trainer knows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from mel_lite.types import Pair, Span


class Unit(StrEnum):
    """Piece of text in which solutions are compared."""

    LINE = "line"
    SENTENCE = "sentence"
    WORD = "word"


_LINE = re.compile(r"[^\r\n\x85\u2028\u2029]+")
# A full stop ends a sentence before white space only, so that 3.5 stays whole; its East Asian forms end one anywhere.
_BETWEEN = {Unit.SENTENCE: re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])"), Unit.WORD: re.compile(r"\s+")}


@dataclass(frozen=True, slots=True)
class Fork:
    """First differing piece of each solution; an empty span at the end where a solution has no further piece."""

    right: Span
    wrong: Span
    unit: Unit


def find_fork(right: str, wrong: str, *, unit: Unit | None = None) -> Fork:
    """Return the first pieces that differ; blanks around a piece and blank lines are ignored.

    Args: `unit` defaults to lines, or sentences where neither text has a line break, or words where each is one
        sentence.
    """
    unit = unit or unit_of(right, wrong)
    pieces, others = find_pieces(right, unit), find_pieces(wrong, unit)
    shared = 0
    for ours, theirs in zip(pieces, others, strict=False):
        if ours.of(right) != theirs.of(wrong):
            break
        shared += 1
    return Fork(_piece(pieces, shared), _piece(others, shared), unit)


def unit_of(right: str, wrong: str) -> Unit:
    """Return the largest unit of which one of the texts has several pieces; words if there is none."""
    for unit in (Unit.LINE, Unit.SENTENCE):
        if any(len(find_pieces(text, unit)) > 1 for text in (right, wrong)):
            return unit
    return Unit.WORD


def find_pieces(text: str, unit: Unit) -> list[Span]:
    """Return the spans of the pieces of a text that are not blank, without the blanks around them."""
    found = []
    for line in _LINE.finditer(text):
        starts, ends = [line.start()], [line.end()]
        if unit is not Unit.LINE:
            gaps = list(_BETWEEN[unit].finditer(text, line.start(), line.end()))
            starts, ends = [*starts, *(gap.end() for gap in gaps)], [*(gap.start() for gap in gaps), *ends]
        for start, end in zip(starts, ends, strict=True):
            content = text[start:end].strip()
            if content:
                first = text.index(content, start)
                found.append(Span(first, first + len(content)))
    return found


def _piece(pieces: Sequence[Span], index: int) -> Span:
    if index < len(pieces):
        return pieces[index]
    end = pieces[-1].end if pieces else 0
    return Span(end, end)


def mark_fork(text: str, span: Span, mark: str) -> str:
    """Return the text with `mark` before the span, on a line start: a line is broken where the span is inside it.

    An empty span, where the text ends before the other one, gets the mark on a line of its own.
    """
    before, after = text[: span.start], text[span.start :]
    line = re.split(r"[\r\n\x85\u2028\u2029]", before)[-1]
    if line.strip():
        before = before.rstrip(" \t") + "\n"
    return before + (mark if span.end > span.start else mark.rstrip()) + after


def fork_tokens(pair: Pair, tokenizer: Any = None) -> tuple[int, int]:
    """Return the index of the first completion token of y+ and of y- from which the solutions part.

    It is the end of the common token prefix. With a tokenizer, solutions that first differ in blanks alone part later:
    where their first differing line begins.
    """
    shared = pair.common_prefix_tokens
    if tokenizer is None:
        return shared, shared
    fork = find_fork(pair.right.text, pair.wrong.text)
    starts = (
        token_range(rollout.completion_ids, span, tokenizer)[0]
        for rollout, span in ((pair.right, fork.right), (pair.wrong, fork.wrong))
    )
    right, wrong = (max(shared, start) for start in starts)
    return right, wrong


def token_range(ids: Sequence[int], span: Span, tokenizer: Any) -> tuple[int, int]:
    """Return [first, end): the tokens of `ids` that overlap the characters `span` of their text.

    The text is `ids` decoded without special tokens. Needs about 2 log2(T) decodings of up to T tokens. A character of
    several tokens belongs to all of them. Exact for tokenizers whose decoding is the concatenation of their tokens'
    bytes.
    """

    def prefix(count: int) -> str:
        return str(tokenizer.decode(list(ids[:count]), skip_special_tokens=True))

    wanted = prefix(len(ids))[: span.end]
    first = _bisect(len(ids), lambda count: len(prefix(count + 1)) > span.start)
    if span.end <= span.start or first == len(ids):
        return first, first
    end = _bisect(len(ids), lambda count: prefix(count)[: span.end] == wanted)
    return first, max(first + 1, end)


def _bisect(high: int, holds: Callable[[int], bool]) -> int:
    """Return the smallest n in [0, high] from which `holds` is true; `high` if it is true for none below."""
    low = 0
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


__all__ = ["Fork", "Unit", "find_fork", "find_pieces", "fork_tokens", "mark_fork", "token_range", "unit_of"]
