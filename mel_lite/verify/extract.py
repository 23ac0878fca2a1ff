r"""Extract final answers from text: find the marked answer, then read it as a number, a letter or text.

Every function runs in time linear in the length of its input and evaluates nothing. Of two markers, the one that ends
last wins. An answer marked twice (`Answer: \boxed{4}`) is unwrapped from the outside in.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from mel_lite.verify import markup

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_DENIED = r"(?<!wrong )(?<!incorrect )(?<!false )"
_PHRASE = re.compile(
    rf"\bfinal[ \t]+{_DENIED}answer[ \t]*(?:(?:is|would[ \t]be|must[ \t]be)\b|[:=\u2192]|->|[-\u2014](?=[ \t]))[\s*:]*"
    rf"|{_DENIED}\banswer[\])]?[ \t]*(?:[:=\u2192]|->|[-\u2014](?=[ \t]))[\s*:]*"
    r"|\bans[.]?[ \t]*[:=][\s*:]*"
    r"|^[ \t#>*_]{0,9}(?:(?:the|my|final|correct)[ \t]){0,3}answer[ \t*_]{0,9}\n\s*",
    re.IGNORECASE | re.MULTILINE,
)
_WEAK_PHRASE = re.compile(
    rf"{_DENIED}(?<!least likely )\banswer[ \t]+(?:(?:is|was|(?:would|must|should|will|has[ \t]to)[ \t]be)\b[ \t*:]*"
    r"|(?=(?:is|was|can)n['\u2019]t\b[^.!?;\n]{1,80}[.!]?\s{0,9}\Z))",
    re.IGNORECASE,
)
HYPOTHESIS = re.compile(
    r"\b(?:assum(?:e|ing|ed)|suppos(?:e|ing)|imagin(?:e|ing)|if|whether|unless)[ \t]+(?:that[ \t]+)?"
    r"(?:(?:the|my|correct|right|final)[ \t]+){0,3}\Z",
    re.IGNORECASE,
)
"""What precedes an `answer is x` that states nothing: `Assume the answer is 5.`"""
_JOINED = re.compile(r"[ \t]*\$?[ \t]*(?:,|;|/|&|or|and|,[ \t]*(?:or|and))[ \t]*\$?[ \t]*", re.IGNORECASE)
_MAX_JOINED = 500
"""Length from which the contents of joined boxes are not collected further."""
_JSON = re.compile(
    r"\"(?:final_?)?answer\"\s{0,9}:\s{0,9}(?:\"(?P<text>(?:[^\"\\\n]|\\.)*)\"|(?P<number>-?[0-9][0-9.eE+-]*))",
    re.IGNORECASE,
)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(?=[^\s#])", re.MULTILINE)
_HEADING = re.compile(r"\d+[.)][ \t]+[A-Za-z]|(?![-+$\\(]?[\d.$\\])\S+[ \t]")
"""Matches a Markdown heading after `####` ('3. Solve', 'Final step'), no answer ('72', '72 apples', '(B)', 'x=5')."""
_SENTENCE_END = re.compile(r"[.;!?](?=\s+[A-Z(\"'])")


@dataclass(frozen=True, slots=True)
class _Mark:
    start: int
    end: int
    content: str


def extract_answer(text: str) -> str | None:
    r"""Return the marked final answer, or None when no marker has content.

    Markers: `<answer>x</answer>`, `\boxed{x}` (balanced braces), `Answer: x`, `final answer is x`, `#### x`. Of several
    markers, the one that ends last wins. `the answer is x` counts only if there is no other marker.
    """
    text = markup.plain(text)
    answer = None
    for _ in range(4):  # nested markers; deeper nesting is not unwrapped
        marks = [
            mark
            for mark in (_tag(text), _boxed(text), _json(text), _phrase(text), _hashes(text))
            if mark and mark.content
        ]
        if not marks and answer is None:
            marks = [mark for mark in (_line_after(text, _last(_WEAK_PHRASE, text)),) if mark and mark.content]
        if not marks:
            break
        last = max(marks, key=lambda mark: (mark.end, -mark.start))
        answer = text = last.content
    return answer


def marked_or_whole(text: str) -> str:
    """Return the marked answer of `text`, or all of it if nothing is marked. Reference answers are read this way."""
    marked = extract_answer(text)
    return markup.strip(markup.plain(text)) if marked is None else marked


def _tag(text: str) -> _Mark | None:
    lower = text.lower() if text.isascii() else re.sub("[A-Z]", lambda match: match[0].lower(), text)
    close = lower.rfind("</answer>")
    start = lower.rfind("<answer>", 0, max(close, 0))
    if close < 0:
        return None
    if start < 0:  # the prompt ended with the opening tag
        start = max(lower.rfind("\n", 0, close) + 1, (lower.rfind("</answer>", 0, close) + 1 or -8) + 8)
        return _Mark(start, close + len("</answer>"), markup.strip(text[start:close]))
    close = lower.find("</answer>", start)
    return _Mark(start, close + len("</answer>"), markup.strip(text[start + len("<answer>") : close]))


def _boxed(text: str) -> _Mark | None:
    """Return the last box. Boxes that only commas, `and` or `or` separate are one answer: `5, 6`."""
    opened: list[tuple[int, int] | None] = []
    last: _Mark | None = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token == "}":
            box = opened.pop() if opened else None
            if box is not None and (content := markup.strip(text[box[1] : match.start()])):
                joined = last is not None and _JOINED.fullmatch(text, last.end, box[0])
                if last is None or not joined:
                    last = _Mark(box[0], match.end(), content)
                elif len(last.content) < _MAX_JOINED:
                    last = _Mark(last.start, match.end(), f"{last.content}, {content}")
                else:
                    last = _Mark(last.start, match.end(), last.content)
        elif token.endswith("{") and len(token) > 2:
            opened.append((match.start(), match.end()))
    return last


def _phrase(text: str) -> _Mark | None:
    return _line_after(text, _last(_PHRASE, text))


def _json(text: str) -> _Mark | None:
    last = None
    for match in _JSON.finditer(text):
        last = match
    return None if last is None else _Mark(last.start(), last.end(), markup.strip(last["text"] or last["number"] or ""))


def _hashes(text: str) -> _Mark | None:
    last = None
    for match in _HASHES.finditer(text):
        if not _HEADING.match(text, match.end()):
            last = match
    return _line_after(text, last)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Return the last match that is followed by text and is no hypothesis."""
    last = None
    for match in pattern.finditer(text):
        if match.end() < len(text) and not HYPOTHESIS.search(text[max(0, match.start() - 60) : match.start()]):
            last = match
    return last


def _line_after(text: str, match: re.Match[str] | None) -> _Mark | None:
    if match is None:
        return None
    start = match.end()
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):  # a displayed formula may take several lines
        if text.startswith(opening, start) and (stop := text.find(closing, start + 2)) >= 0:
            return _Mark(match.start(), stop + 2, markup.strip(text[start + 2 : stop]))
    end = text.find("\n", start)
    end = len(text) if end < 0 else end
    return _Mark(match.start(), end, markup.strip(text[start:end]))


def first_sentence(text: str) -> str:
    """Return the text before the first sentence end that a capital letter follows: `7. The rest is ...` -> `7`."""
    first = _SENTENCE_END.split(text, maxsplit=1)[0].strip()
    return first if first.endswith("...") else first.rstrip(".").strip()


def last_line(text: str) -> str:
    """Return the last non-blank line, or an empty string."""
    stripped = markup.clean(text).rstrip()
    return stripped[stripped.rfind("\n") + 1 :].strip()


# Text -------------------------------------------------------------------------------------------------------------

TEXT_COMMAND = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|textrm|mathit|textsf|texttt|emph|underline|bf|mbox|operatorname)\s*\{([^{}]*)\}"
)
_BRACKETED_WORDS = re.compile(r"\[[^\W\d_](?:[^\[\](),\d]*[^\W\d_])?\]")
_PARENTHESIZED = re.compile(r"\([^(),]+\)")
_CLOCK = re.compile(r"(?<=[0-9])\s?([apAP])\.?\s?[mM]\b\.?")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")


def normalize(text: str) -> str:
    r"""Prepare text for comparison: NFC, folded case, single spaces.

    Removes `\text{}`, and at the ends `$`, quotes, Markdown and the sentence's punctuation.
    """
    straight = markup.plain(text).replace("\u2019", "'").replace("\u2018", "'")
    whole = " ".join(TEXT_COMMAND.sub(r"\1", unicodedata.normalize("NFC", straight)).split())
    text, before = whole, None
    while text != before:
        before = text
        for start, end in ((r"\(", r"\)"), (r"\[", r"\]")):
            if text.startswith(start) and text.endswith(end):
                text = text[2:-2]
        if _PARENTHESIZED.fullmatch(text) or _BRACKETED_WORDS.fullmatch(text):
            text = text[1:-1]
        text = text.strip("$*`_ " + markup.QUOTES).rstrip(".,;:!?").rstrip()
    return _CLOCK.sub(r" \1m", text or whole).casefold()


def is_word(text: str) -> bool:
    """Return True for an answer of at least four letters and nothing else ('Tuesday'), not a product of variables."""
    return _WORD.fullmatch(normalize(text)) is not None


def has_math_delimiters(text: str) -> bool:
    r"""Return True when formulas in the text are delimited by `$`, `\(` or `\[`."""
    return text.strip("$").count("$") >= 1 or "\\(" in text or "\\[" in text
