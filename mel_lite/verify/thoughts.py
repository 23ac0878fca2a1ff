"""Tell a completion's answer from the thoughts before it, by the tags that models write around their thoughts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from mel_lite.errors import ConfigError

_CHANNELS = ("<|channel|>analysis", "<|channel|>final")
THINK_TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    _CHANNELS,
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<reflection>", "</reflection>"),
    ("<unused94>", "<unused95>"),
)
"""(start, end) of a thought for the usual reasoning models. Case is ignored."""

_HEADER = re.compile(r"\s*(?:<\|(?:constrain|message)\|>\s*)+", re.IGNORECASE)
_OPENED = r"(?:\s|<\|message\|>)*\Z"
_CONTROL = re.compile(r"(?:\s|<\|[A-Za-z0-9_]{1,40}\|>|</s>|<(?:eos|end_of_turn)>)+\Z")
_DECODED_CHANNELS = re.compile(r"\A\s*analysis(?=[A-Z\"(])")
"""Start of a thought in gpt-oss's channels, decoded without their special tokens: `analysisWe ...assistantfinal7`."""


def answer_part(text: str, tags: Sequence[tuple[str, str]] = THINK_TAGS) -> str | None:
    """Return the text after the last end of a thought, or all of it when there is no thought.

    None when the last thought has no end: a guess inside a truncated thought is no answer.
    """
    end, position, opened = None, 0, False
    for match in _pattern(tuple(tags)).finditer(text):
        opened = match.lastgroup == "start"
        if not opened:
            end = position = match.end()
    if opened:
        return None
    if end is None and _CHANNELS in tags and _DECODED_CHANNELS.match(text):
        _, found, answer = text.rpartition("assistantfinal")
        return answer if found else None
    if end is None:
        return text
    header = _HEADER.match(text, position)
    return _without_control(text[header.end() if header else position :])


def opened_thought(prompt_end: str, tags: Sequence[tuple[str, str]] = THINK_TAGS) -> str:
    """Return the start tag that a rendered prompt ends with, since the model's text continues that thought; else ""."""
    for start, _ in sorted(tags, key=lambda pair: -len(pair[0])):
        if re.search(re.escape(start) + _OPENED, prompt_end, re.IGNORECASE):
            return start
    return ""


def _without_control(text: str) -> str:
    tail = _CONTROL.search(text, max(0, len(text) - 200))
    return text[: tail.start()] if tail else text


@lru_cache(maxsize=8)
def _pattern(tags: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    if not tags:
        return re.compile(r"(?!)")
    starts, ends = (
        "|".join(re.escape(tag) for tag in sorted(side, key=len, reverse=True)) for side in zip(*tags, strict=True)
    )
    return re.compile(f"(?P<end>{ends})|(?P<start>{starts})", re.IGNORECASE)


def parse_tags(value: Any) -> tuple[tuple[str, str], ...]:
    """Return the (start, end) tags of an option's value: None for the usual ones, else texts `START END`.

    Raises: ConfigError for a text that is not two tags.
    """
    if value is None:
        return THINK_TAGS
    pairs = [tuple(entry.split()) if isinstance(entry, str) else tuple(entry) for entry in value]
    for entry, pair in zip(value, pairs, strict=True):
        if len(pair) != 2 or not all(isinstance(tag, str) and tag for tag in pair) or pair[0] == pair[1]:
            raise ConfigError(
                f"think_tags has {entry!r}, which is not the start and the end of a thought. Write both tags with a "
                "space between them, such as '<think> </think>'."
            )
    return tuple((start, end) for start, end in pairs)
