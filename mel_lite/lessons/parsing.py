"""Parse the sections of an analysis, tolerating small models' formatting."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mel_lite.lessons.prompts import DEFAULT_TEMPLATES
from mel_lite.types import EarlyEnd, Finish, MetaExperience

if TYPE_CHECKING:
    pass

MAX_CHARS = 40_000
"""Maximum length; longer output is degenerate."""
MIN_WORDS = 8
"""Fewest words of all parts together."""
MIN_RULE_WORDS = 3
"""Fewest words of the heuristics."""
MAX_ECHO = 0.5
"""Largest share of a part that may be copied from the instructions, as small models like to do."""


class ParseFailure(Exception):
    """An analysis that holds no meta-experience; the message is the reason, in one sentence."""


_BIFURCATION, _CRITIQUE, _REFLECTION, _HEURISTIC = "bifurcation", "critique", "reflection", "heuristic"

_NAMES = {
    _BIFURCATION: (
        r"bifurcations?|(?:failure|divergence|branching|parting|turning) points?|points? of (?:failure|divergence|"
        r"bifurcation|departure|parting)|cognitive patterns?|(?:first|critical|key) (?:error|mistake|wrong step)|"
        r"where (?:it|they|the (?:two )?solutions?|the reasoning|the incorrect solution) "
        r"(?:went wrong|goes wrong|diverged?s?|parts?|splits?|fails?|failed)"
    ),
    _CRITIQUE: (
        r"critiques?|criticisms?|root[- ]causes?(?: analysis)?|(?:error |failure )?(?:analysis|diagnosis)|"
        r"latent defects?|violated constraints?|causes? of (?:the )?(?:failure|error)|why it (?:failed|fails|is wrong)|"
        r"success factors?|(?:protective|protecting) factors?|contrasts?|comparison|evaluation"
    ),
    _REFLECTION: r"(?:self[- ]|personal |first[- ]person )?reflections?|(?:key )?insights?|reviews?",
    _HEURISTIC: (
        r"heuristics?|(?:key )?lessons?(?: learn(?:ed|t))?|(?:general |reusable |future |named )?(?:rules?|principles?|"
        r"guidelines?|heuristics?|strateg(?:y|ies))(?: of thumb)?|(?:key )?take-?aways?|abstractions?"
    ),
}
_NAME = re.compile(
    r"(?:the |my |our )?(?:" + "|".join(f"(?P<{part}>{names})" for part, names in _NAMES.items()) + r")(?![A-Za-z0-9])",
    re.I,
)
_NUMBER = re.compile(r"\(?(?:\d{1,2}|[ivxIVX]{1,4}|[a-dA-D])[.):]\s*|(?:section|part)\s+\d{1,2}\s*[:.)-]?\s*", re.I)
_DECORATION = " \t#>*_`\"'[-+\u2022"
_NEW_TURN = re.compile(r"(?:human|user|assistant|system)\s*:", re.I)
_NEW_PROBLEM = re.compile(r"(?:human|user|assistant|system|question|problem)\s*:", re.I)
_PLACEHOLDER = re.compile(r"(?:\W|\b(?:n/?a|none|todo|tbd|your text(?: here)?)\b)*", re.I)
_RULER = re.compile(r"\s*(?:```\w*|-{3,}|\*{3,}|[{}]),?\s*")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")


@dataclass(frozen=True, slots=True)
class _Heading:
    """A line that names a part. `part` is empty for a heading of something else."""

    line: int
    part: str
    level: int
    """Number of #; 0 for a heading in bold, numbered or plain."""
    rest: str
    """Text after the name on the same line."""


def parse_analysis(text: str, *, finish: Finish, instructions: str = DEFAULT_TEMPLATES.analysis_user) -> MetaExperience:
    """Read M = (s*, C, H) out of an analysis; a reflection becomes part of the critique C.

    Tolerates what small models do to headings (level, bold, numbers, colons, case, other names, order, JSON) and text
    before the first and after the last part. Time is linear in `len(text)`.

    Raises: ParseFailure for an analysis that is too long or too short, repeats itself or the `instructions`, has no
    text for a part, or was cut off before its heuristics.
    """
    if len(text) > MAX_CHARS:
        raise ParseFailure(f"runaway: {len(text)} characters, at most {MAX_CHARS} are read")
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    text = text.rpartition("</think>")[2]
    sections = _json_sections(text) or _headed_sections(text)
    if _HEURISTIC not in sections and finish is Finish.LENGTH:
        raise ParseFailure("cut off at the token limit before the heuristics")
    if finish is Finish.LENGTH and "\n" in sections[_HEURISTIC]:
        sections[_HEURISTIC] = sections[_HEURISTIC].rpartition("\n")[0].strip()
    critique = "\n\n".join(filter(None, (sections.get(_CRITIQUE), sections.get(_REFLECTION))))
    parsed = MetaExperience(sections.get(_BIFURCATION, ""), critique, sections.get(_HEURISTIC, ""))
    for part in (_BIFURCATION, _CRITIQUE, _HEURISTIC):
        if not getattr(parsed, part):
            raise ParseFailure(f"no {part}: " + ("the part is empty" if part in sections else "there is no such part"))
    words = [_WORD.findall(part) for part in (parsed.bifurcation, parsed.critique, parsed.heuristic)]
    if sum(map(len, words)) < MIN_WORDS or len(words[2]) < MIN_RULE_WORDS:
        raise ParseFailure(f"too short: {sum(map(len, words))} words, {len(words[2])} of them heuristics")
    for part, part_words in zip((_BIFURCATION, _CRITIQUE, _HEURISTIC), words, strict=True):
        if (share := _echo(part_words, _WORD.findall(instructions))) > MAX_ECHO:
            raise ParseFailure(f"repeats the instructions: {share:.0%} of the {part}")
    repeated = _repetition(text)
    if repeated:
        raise ParseFailure(f"repeats itself: {repeated}")
    return parsed


def _json_sections(text: str) -> dict[str, str]:
    """Return the parts of a reply that is a JSON object; {} for any other reply."""
    start, end = text.find("{"), text.rfind("}")
    sections: dict[str, str] = {}
    try:
        for key, value in json.loads(text[start : end + 1], strict=False).items() if 0 <= start < end else ():
            named = _NAME.match(str(key).replace("_", " ").strip(_DECORATION))
            if named and named.lastgroup:
                sections[named.lastgroup] = _joined(sections.get(named.lastgroup, ""), "\n".join(_leaves(value)))
    except (ValueError, RecursionError):
        return {}
    return {part: _clean(content) for part, content in sections.items()} if len(sections) > 1 else {}


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value, one line each."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{key}: " + "\n".join(_leaves(inner))
    elif isinstance(value, list):
        for inner in value:
            yield "- " + "\n".join(_leaves(inner))
    elif value is not None:
        yield str(value)


def _headed_sections(text: str) -> dict[str, str]:
    """Return the parts of a reply by headings; drop what follows the heuristics under a name already seen."""
    lines = text.split("\n")
    headings = _ranked([heading for number, line in enumerate(lines) if (heading := _heading(number, line))])
    sections: dict[str, str] = {}
    part, level = "", 0
    ends = [heading.line for heading in headings[1:]] + [len(lines)]
    for heading, end in zip(headings, ends, strict=False):
        body = "\n".join([heading.rest, *lines[heading.line + 1 : end]])
        if part and not heading.part and heading.level > level:
            body = f"{lines[heading.line].strip(_DECORATION)}\n{body}"  # a subheading of the part above
        elif heading.part != part:
            starts_over = bool(sections.get(heading.part) and sections.get(_HEURISTIC))
            part, level = "" if starts_over else heading.part, heading.level
        if part:
            sections[part] = _joined(sections.get(part, ""), _until_new_turn(body, part))
    return {part: _clean(content) for part, content in sections.items()}


def _ranked(headings: list[_Heading]) -> list[_Heading]:
    """Demote lower headings to text when the headings of one rank and above already name all parts.

    So "**Root cause check:** if ..." stays a rule of the heuristics, and "### Insight" a piece of the critique.
    """
    for rank in sorted({heading.level for heading in headings if heading.level}):
        named = {heading.part for heading in headings if 0 < heading.level <= rank}
        if {_BIFURCATION, _HEURISTIC} <= named and named & {_CRITIQUE, _REFLECTION}:
            marked = [heading for heading in headings if heading.level]
            return [heading if heading.level <= rank else replace(heading, part="", rest="") for heading in marked]
    return headings


def _heading(number: int, line: str) -> _Heading | None:
    """Read a line as a heading: marked by # or bold, numbered, alone on the line, or followed by a colon."""
    stripped = line.strip()
    name = stripped.lstrip(_DECORATION)
    marks = stripped[: len(stripped) - len(name)]
    level = marks.count("#")
    if found := _NUMBER.match(name):
        unnumbered = name[found.end() :].lstrip(_DECORATION)
        marks += name[: len(name) - len(unnumbered)]
        name = unnumbered
    named = _NAME.match(name)
    if not named or not named.lastgroup:
        return _Heading(number, "", level, "") if level else None
    title, colon, rest = name[named.end() :].partition(":")
    title_is_short = len(title) <= 60 and "." not in title
    if not title.strip(" \t*_`\"'])-\u2013\u2014=.#"):
        pass  # the name alone, or the name and a colon
    elif colon and title_is_short and (level or "**" in marks or not rest.strip()):
        pass  # "## Critique of the incorrect solution: ..."
    elif level:
        rest = ""  # "## Failure point and cognitive pattern"
    elif "**" in marks and "**" in title:
        rest = title.partition("**")[2]  # "**Critique** the solution ..."
    elif re.match(r"\s+[-\u2013\u2014]\s", title):
        rest = name[named.end() :].lstrip(" -\u2013\u2014")
    else:
        return None
    return _Heading(number, named.lastgroup, level, rest.strip(" \t*_").rstrip(","))


def _until_new_turn(body: str, part: str) -> str:
    """Return the body up to a line that opens another chat turn or, after the heuristics, another problem."""
    opens = _NEW_PROBLEM if part == _HEURISTIC else _NEW_TURN
    lines = body.split("\n")
    for number, line in enumerate(lines):
        if number and opens.match(line.lstrip(" #*_<|")):
            return "\n".join(lines[:number])
    return body


def _joined(first: str, second: str) -> str:
    return f"{first}\n{second}" if first.strip() else second


def _clean(text: str) -> str:
    """Strip fences, rules, loose quotes and surrounding blanks; return '' when only a placeholder is left."""
    lines = [line.rstrip() for line in text.split("\n") if not _RULER.fullmatch(line)]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip().removesuffix(",").strip("\"'")
    return "" if _PLACEHOLDER.fullmatch(text[:200]) and len(text) <= 200 else text.strip()


def _echo(words: list[str], source: list[str]) -> float:
    """Return the share of `words`, in [0, 1], that lie in runs of 5 or more that also occur in `source`."""
    runs = set(zip(*([word.lower() for word in source[i:]] for i in range(5)), strict=False))
    echoed: set[int] = set()
    for i in range(len(words) - 4):
        if tuple(word.lower() for word in words[i : i + 5]) in runs:
            echoed.update(range(i, i + 5))
    return len(echoed) / max(1, len(words))


def _repetition(text: str) -> str:
    """Return the evidence of a loop, or '': one word repeated, few distinct phrases, text that compresses too well."""
    words = [word.lower() for word in _WORD.findall(text)]
    if run := _word_run(words):
        return run
    phrases = list(zip(*(words[i:] for i in range(4)), strict=False))
    if len(phrases) >= 32 and len(set(phrases)) < 0.4 * len(phrases):
        return f"{len(set(phrases))} of {len(phrases)} four-word phrases are distinct"
    raw = text.encode(errors="replace")
    if len(raw) >= 400 and len(zlib.compress(raw)) < 0.12 * len(raw):
        return f"{len(raw)} bytes compress to {len(zlib.compress(raw))}"
    return ""


def _word_run(words: list[str]) -> str:
    run = 1
    for previous, word in pairwise(words):
        run = run + 1 if word == previous else 1
        if run >= 8:
            return f"the word {word[:20]!r} occurs {run} times in a row"
    return ""


def hopeless(text: str, when: EarlyEnd, *, share: float, prefill: str = "") -> str:
    """Return why an unfinished analysis is not worth finishing; '' while it may be.

    With `certain`, `parse_analysis` rejects every continuation of `text`, unless one closes a thought that was never
    opened. `likely` adds loops that could still end, and text with no section but the prefill's at half of the budget.

    Args: `text` with the prefill; `share` of the token budget that is spent, in [0, 1].
    """
    if when is EarlyEnd.NEVER:
        return ""
    if len(text) > MAX_CHARS:
        return f"{len(text)} characters, at most {MAX_CHARS} are read"
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").rpartition("</think>")[2]
    if "<think>" in text:
        return ""
    complete = re.sub(r"[\w\ufffd]+\Z", "", text)  # the last word may go on
    if run := _word_run([word.lower() for word in _WORD.findall(complete)]):
        return run
    if when is EarlyEnd.CERTAIN:
        return ""
    if loop := _repetition(complete):
        return loop
    is_named = "{" in text or _parts(complete) - _parts(prefill)
    return "" if share < 0.5 or is_named else "no further section by half of its tokens"


def _parts(text: str) -> set[str]:
    headings = (_heading(number, line) for number, line in enumerate(text.split("\n")))
    return {heading.part for heading in headings if heading and heading.part}


__all__ = ["ParseFailure", "hopeless", "parse_analysis"]
