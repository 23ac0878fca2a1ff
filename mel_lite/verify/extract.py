r"""Extract final answers from text: find the marked answer, then read it as a number, a letter or text.

Every function runs in time linear in the length of its input and evaluates nothing. Of two markers, the one that ends
last wins. An answer marked twice (`Answer: \boxed{4}`) is unwrapped from the outside in.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

TOLERANCE = Fraction(2, 10**6)
"""Largest difference between equal numbers when at least one is not an integer. Scaled by the larger one if below 1."""
MAX_DIGITS = 400
"""Longest number that is read, and the largest power of ten. No honest answer exceeds it."""

_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}
_PLAIN = _FULL_WIDTH | {0x2212: "-", 0x2013: "-", 0xA0: " ", 0x202F: " ", 0x2009: " "}
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_PHRASE = re.compile(
    r"\b(?:final[ \t]+answer(?:[ \t]*\*\*)?[ \t]*(?:is\b|[:=])|answer(?:[ \t]*\*\*)?[ \t]*[:=])[\s*:]*", re.IGNORECASE
)
_WEAK_PHRASE = re.compile(r"\banswer[ \t]+is\b[ \t*:]*", re.IGNORECASE)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(?=[^\s#])", re.MULTILINE)
_HEADING = re.compile(r"\d+[.)][ \t]+[A-Za-z]|(?![-+$\\(]?[\d.$\\])\S+[ \t]")
"""Matches a Markdown heading after `####` ('3. Solve', 'Final step'), no answer ('72', '72 apples', '(B)', 'x=5')."""
_SENTENCE_END = re.compile(r"[.;!?](?=\s+[A-Z(\"'])")


def clean(text: str) -> str:
    """Replace control and direction characters by spaces, and full-width characters by their ASCII forms."""
    return _INVISIBLE.sub(" ", text).translate(_PLAIN)


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
    text = clean(text)
    answer = None
    for _ in range(4):  # nested markers; deeper nesting is not unwrapped
        marks = [mark for mark in (_tag(text), _boxed(text), _phrase(text), _hashes(text)) if mark and mark.content]
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
    return clean(text).strip() if marked is None else marked


def _tag(text: str) -> _Mark | None:
    lower = text.lower() if text.isascii() else re.sub("[A-Z]", lambda match: match[0].lower(), text)
    close = lower.rfind("</answer>")
    start = lower.rfind("<answer>", 0, max(close, 0))
    if close < 0 or start < 0:
        return None
    close = lower.find("</answer>", start)
    return _Mark(start, close + len("</answer>"), _strip(text[start + len("<answer>") : close]))


def _boxed(text: str) -> _Mark | None:
    opened: list[tuple[int, int] | None] = []
    last = None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            opened.append(None)
        elif token == "}":
            box = opened.pop() if opened else None
            if box is not None and text[box[1] : match.start()].strip():
                last = (*box, match.start())
        elif token.endswith("{") and len(token) > 2:
            opened.append((match.start(), match.end()))
    return None if last is None else _Mark(last[0], last[2] + 1, _strip(text[last[1] : last[2]]))


def _phrase(text: str) -> _Mark | None:
    return _line_after(text, _last(_PHRASE, text))


def _hashes(text: str) -> _Mark | None:
    last = None
    for match in _HASHES.finditer(text):
        if not _HEADING.match(text, match.end()):
            last = match
    return _line_after(text, last)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Return the last match that is followed by text."""
    last = None
    for match in pattern.finditer(text):
        if match.end() < len(text):
            last = match
    return last


def _line_after(text: str, match: re.Match[str] | None) -> _Mark | None:
    if match is None:
        return None
    end = text.find("\n", match.end())
    end = len(text) if end < 0 else end
    return _Mark(match.start(), end, _strip(text[match.end() : end]))


def _strip(text: str) -> str:
    return text.strip().strip("*`_").strip()


def first_sentence(text: str) -> str:
    """Return the text before the first sentence end that a capital letter follows: `7. The rest is ...` -> `7`."""
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip().rstrip(".").strip()


def last_line(text: str) -> str:
    """Return the last non-blank line, or an empty string."""
    stripped = clean(text).rstrip()
    return stripped[stripped.rfind("\n") + 1 :].strip()


# Text -------------------------------------------------------------------------------------------------------------

_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]{3,}")


def normalize(text: str) -> str:
    r"""Prepare text for comparison: NFC, folded case, single spaces.

    Removes `\text{}`, and at the ends `$`, quotes, Markdown and the final dot.
    """
    text = _TEXT_COMMAND.sub(r"\1", unicodedata.normalize("NFC", clean(text)))
    return " ".join(text.split()).strip("$*`_\"' ").rstrip(".").rstrip().casefold()


def is_word(text: str) -> bool:
    """Return True for an answer of at least four letters and nothing else ('Tuesday'), not a product of variables."""
    return _WORD.fullmatch(normalize(text)) is not None


def has_math_delimiters(text: str) -> bool:
    r"""Return True when formulas in the text are delimited by `$`, `\(` or `\[`."""
    return text.strip("$").count("$") >= 1 or "\\(" in text or "\\[" in text


# Numbers ----------------------------------------------------------------------------------------------------------

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    r"(?<![\w.^])(?P<sign>(?<![\w)])[-+][ ]?)?(?:[$\u20ac\u00a3\u00a5\u20b9][ ]?)?(?P<inner>-)?"
    rf"(?:(?P<whole>[0-9]{{1,9}})[ ]+(?=[0-9]+[ ]?/))?(?P<value>{_DECIMAL})(?:[ ]?/[ ]?(?P<denominator>{_DECIMAL}))?"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,4})(?![\w.])"
    r"|[ ]?(?:\*|x|\u00d7|\\times|\\cdot)[ ]?10\^\{?(?P<power>-?[0-9]{1,4})\}?)?"
    r"(?P<percent>[ ]?%|[ ]percent\b)?"
)
_FRACTION = re.compile(r"(?P<left>[0-9])?\s*\\[dt]?frac\s*(?:\{\s*([0-9.]+)\s*\}\s*\{\s*([0-9.]+)\s*\}|([0-9])([0-9]))")
_LATEX_NOISE = re.compile(r"\\[,;!: ]|\\(?:left|right|displaystyle|quad)\b|\^\s*\{?\\circ\}?|~")
_UNIT = re.compile(
    r"(?<![A-Za-z])(?:(?:[mck]?m|in|ft|yd|mi|inches|feet|units?)\s*\^\s*\{?[23]\}?"
    r"|(?:[mck]?m|mi|ft|miles|meters|dollars|g|kg)\s*/\s*(?:hr?|s|min|day|hour|kg|cm|m)\b)"
)
_NOT_A_NUMBER = re.compile(r"[\\^*/+<>\u2264\u2265\u221a\u03c0\[\]{}|]|\b(?:pi|sqrt|i)\b")
_VARIABLE = re.compile(r"[0-9][abnpqrtxyz]\b")


@dataclass(frozen=True, slots=True)
class Number:
    """Number as an answer states it: `50%` is (50, percent)."""

    value: Fraction
    percent: bool = False


def same_number(left: Number, right: Number) -> bool:
    """Return True for equal numbers: exactly for two integers, else within TOLERANCE.

    If only one has a percent sign, `50%` equals both 50 and 0.5.
    """
    if left.percent != right.percent:
        as_share, plain = (left, right) if left.percent else (right, left)
        return _close(as_share.value, plain.value) or _close(as_share.value / 100, plain.value)
    return _close(left.value, right.value)


def _close(left: Fraction, right: Fraction) -> bool:
    if left.denominator == right.denominator == 1:
        return left == right
    return abs(left - right) <= TOLERANCE * min(Fraction(1), max(abs(left), abs(right)))


def last_number(text: str) -> Number | None:
    """Return the last number in the last 2,000 characters of the text."""
    text = _plain(text[-2_000:])
    return next((number for match in reversed(list(_NUMBER.finditer(text))) if (number := _read(match))), None)


def sole_number(text: str) -> Number | None:
    """Return the only number the text states after its last `=`. None for several different numbers, or a formula."""
    if len(text) > 2_000:
        return None
    text = _plain(first_sentence(text))
    text = re.split(r"=|\u2248|\\approx|\\equiv", text)[-1]
    matches = list(_NUMBER.finditer(text))
    numbers = {_read(match) for match in matches}
    if len(numbers) != 1 or _VARIABLE.search(text) or _NOT_A_NUMBER.search(_NUMBER.sub(" ", text)):
        return None
    return numbers.pop()


def _plain(text: str) -> str:
    """Rewrite LaTeX fractions as plain text and remove LaTeX spacing and units."""
    text = clean(text)
    for markup, plain in (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\(", " "), ("\\)", " ")):
        text = text.replace(markup, plain)
    text = _UNIT.sub(" ", _LATEX_NOISE.sub(" ", _TEXT_COMMAND.sub(r" \1 ", text)))

    def fraction(match: re.Match[str]) -> str:
        left = f"{match['left']} " if match["left"] else ""
        return f"{left}{match[2] or match[4]}/{match[3] or match[5]}"

    return _FRACTION.sub(fraction, text)


def _read(match: re.Match[str]) -> Number | None:
    power = int(match["exponent"] or match["power"] or 0)
    if len(match[0]) > MAX_DIGITS or abs(power) > MAX_DIGITS:
        return None
    try:
        value = Fraction(match["value"].replace(",", ""))
        if match["denominator"]:
            value /= Fraction(match["denominator"].replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
    value = (value + int(match["whole"] or 0)) * Fraction(10) ** power
    negative = (match["sign"] or "").startswith("-") != (match["inner"] is not None)
    return Number(-value if negative else value, match["percent"] is not None)


# Letters ----------------------------------------------------------------------------------------------------------

_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|letter|answer)\s*(?:is\s*)?:?\s*)?"
    r"[(\[{]?\s*(?P<letter>[A-Ja-j])\s*[)\]}]?"
    r"(?P<rest>$|[.:,;)-].*|\s+(?:because|since|as|is\s+(?:correct|right|the))\b.*|\s+-\s.*|\s*\u2014.*)",
    re.DOTALL | re.IGNORECASE,
)
_SECOND_LETTER = re.compile(r"\W{0,4}(?:(?:or|and)\W{1,4})?(?:[A-J]\b|\([A-J]\))", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([A-J])\)")


def choice_letter(text: str) -> str | None:
    """Return the option that a short text names, in upper case. None when it names none, or two."""
    text = _TEXT_COMMAND.sub(r"\1", clean(text[:2_000])).strip("$*`_\"' \t\n")
    match = _LETTER.match(text)
    if match is None:
        return None
    rest = match["rest"].strip(" .")
    if match["letter"].islower() and rest and not text.lower().startswith(("option", "choice", "(")):
        return None  # the article in "a dog", not the option
    if _SECOND_LETTER.fullmatch(rest) or re.match(r"(?:[,/&]|or\b|and\b)\s*\(?[A-J]\b", rest):
        return None
    return match["letter"].upper()


def sole_choice(text: str) -> str | None:
    """Return the option that a text without markers names, or None.

    The last line or the whole text must name it, or exactly one bracketed letter must occur in the text.
    """
    letter = choice_letter(last_line(text)) or choice_letter(text)
    if letter:
        return letter
    bracketed = set(_BRACKETED.findall(text))
    return bracketed.pop() if len(bracketed) == 1 else None
