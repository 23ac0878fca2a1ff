"""Helpers for messages, and untrusted text made safe for a terminal."""

from __future__ import annotations

import difflib
import unicodedata
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any


def did_you_mean(name: object, choices: Iterable[str], *, most: int = 1) -> str:
    """Return " Did you mean 'x'?" with the nearest of `choices` (up to `most` of them); empty when none is near."""
    near = difflib.get_close_matches(str(name), list(choices), n=most, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def suggest(name: object, choices: Iterable[str]) -> str:
    """Return `did_you_mean`, or " Known: a, b." with all choices when none is near; empty without choices."""
    known = sorted(choices)
    return did_you_mean(name, known) or (f" Known: {', '.join(known)}." if known else "")


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an exception's message, at most `limit` characters; empty when it has none."""
    return (str(error).splitlines() or [""])[0][:limit]


def shorten(text: str, limit: int = 80) -> str:
    """Return `text`, or its start and `...` when it has more than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def common_prefix_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of leading token ids that `a` and `b` share: max n with a[:n] == b[:n]."""
    for n, (id_a, id_b) in enumerate(zip(a, b, strict=False)):
        if id_a != id_b:
            return n
    return min(len(a), len(b))


def printable(text: str) -> str:
    """Replace every control, format and unassigned character by U+FFFD; line breaks and tabs stay.

    Such characters (Unicode category C) can move the cursor, set the window's title, or reorder the text.
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)


def printable_all(value: Any) -> Any:
    """Apply `printable` to every text in lists, tuples, deques and the values of dicts. Other values stay."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (list, tuple, deque)):
        return type(value)(printable_all(item) for item in value)
    if isinstance(value, dict):
        return {name: printable_all(item) for name, item in value.items()}
    return value
