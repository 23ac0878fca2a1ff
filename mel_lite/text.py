"""Text that others wrote, made fit for a terminal."""

from __future__ import annotations

import unicodedata
from collections import deque
from typing import Any


def printable(text: str) -> str:
    """`text` with every control, format and unassigned character replaced by U+FFFD; line breaks and tabs stay.

    Such characters can move the cursor, set the window's title, or reorder what is read (Unicode category C).
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)


def printable_all(value: Any) -> Any:
    """The same for every text in lists, tuples, deques and the values of dicts; anything else as it is."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, (list, tuple, deque)):
        return type(value)(printable_all(item) for item in value)
    if isinstance(value, dict):
        return {name: printable_all(item) for name, item in value.items()}
    return value
