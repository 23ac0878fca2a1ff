"""Where a text mentions a reference answer, and whether the mention states it as the result.

Numbers are found however they are written. An answer too short to be telling (one digit, one letter, an everyday word),
or one that the question itself mentions, counts only in a context that puts it forward: "= 7", "the answer is B".
Every pass is linear: patterns that look around a mention see a window of fixed size.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from mel_lite import answers

# ---- numbers ---------------------------------------------------------------------------------------------------------

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORD_VALUES = {word: value for value, word in enumerate(_SMALL)} | {w: 20 + 10 * i for i, w in enumerate(_TENS)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_SPELLED = "|".join([*_WORD_VALUES, *_SCALES])
_NUMBER = re.compile(
    rf"""\\[dtc]?frac\s?(?:\{{\s?(?P<p>-?\d{{1,12}})\s?\}}\s?\{{\s?(?P<q>\d{{1,12}})\s?\}}|(?P<p1>\d)(?P<q1>\d))
    |(?P<vulgar>[\u00bc-\u00be\u2150-\u215e])
    |(?<![\d./])(?P<p2>\d{{1,12}})\s?/\s?(?P<q2>\d{{1,12}})(?![\d/])
    |(?P<digits>(?<![\d.])(?:\d{{1,3}}(?:(?:,|\{{,\}}|\\,|\\!|_)\d{{3}}){{1,12}}(?!\d)|\d{{1,40}})(?:\.\d{{1,40}})?(?:e[+-]?\d{{1,2}})?
      |(?<![\d.])\.\d{{1,40}})
    |(?P<words>\b(?:{_SPELLED})(?:(?:[ \t-]|[ ]and[ ])(?:{_SPELLED})){{0,11}}\b)""",
    re.I | re.X,
)
_SIGN = re.compile(r"(?:-|\bminus |\bnegative )$", re.I)
_MINUEND = re.compile(r"(?:[\w)\]}]|(?:[\d)\]}]|\b[A-Za-z])[ ])$")
"""What makes the sign after it a subtraction: something right before it, or a number or variable and a blank."""
_PERCENT = re.compile(r"\s?(?:\\?%|per ?cent\b)", re.I)


@dataclass(frozen=True, slots=True)
class Mention:
    """A number where it stands in a text."""

    start: int
    end: int
    number: answers.Number
    form: str
    """The way it is written, separators aside: `1234`, `3/4`, `75%`."""
    decimals: int
    spelled: bool

    def means(self, gold: answers.Number) -> bool:
        """True for the same number, as percent or share too, or for a decimal of 3 places or more that rounds it."""
        if self.number.percent != gold.percent:
            share, other = (self.number, gold) if self.number.percent else (gold, self.number)
            return share.value == other.value or (share.value / 100 == other.value and other.value.denominator != 1)
        gap = abs(self.number.value - gold.value)
        return gap == 0 or (self.decimals >= 3 and 2 * gap * 10**self.decimals <= 1)


def numbers_in(text: str) -> Iterator[Mention]:
    """Every number in a folded text: digits with separators, decimals, fractions, LaTeX, percent, or spelled out."""
    for match in _NUMBER.finditer(text):
        value = _value_of(match)
        if value is None:
            continue
        start, end = match.span()
        sign = _SIGN.search(text[max(0, start - 10) : start])
        if sign and not _MINUEND.search(text[: start - len(sign[0])][-3:]):
            start, value = start - len(sign[0]), -value
        percent = _PERCENT.match(text[end : end + 10])
        end += len(percent[0]) if percent else 0
        decimals = len((match["digits"] or "").partition(".")[2])
        form = "/".join(part for part in match.group("p", "p1", "p2", "q", "q1", "q2") if part) or str(value)
        number = answers.Number(value, percent is not None)
        yield Mention(start, end, number, form + "%" * number.percent, decimals, match["words"] is not None)


def _value_of(match: re.Match[str]) -> Fraction | None:
    if match["words"]:
        total = current = 0
        for word in re.findall("[a-z]+", match["words"].lower()):
            if word in ("thousand", "million"):
                total, current = total + max(1, current) * _SCALES[word], 0
            elif word == "hundred":
                current = max(1, current) * 100
            else:
                current += _WORD_VALUES.get(word, 0)
        return Fraction(total + current)
    if match["vulgar"]:
        return Fraction(unicodedata.numeric(match["vulgar"])).limit_denominator(100)
    if match["digits"]:
        return Fraction(re.sub(r"[,{}\\!_]", "", match["digits"]))
    top, bottom = match["p"] or match["p1"] or match["p2"], match["q"] or match["q1"] or match["q2"]
    return Fraction(int(top), int(bottom)) if int(bottom) else None


# ---- the answer ------------------------------------------------------------------------------------------------------

_EVERYDAY = frozenset(
    "yes no not true false even odd positive negative zero none never always increasing decreasing left right up down "
    "both neither equal more less first second last possible impossible valid invalid correct incorrect greater "
    "smaller same different all infinite undefined unknown a an the it and or".split()
)
_WRAPPERS = re.compile(r"\$|\\left|\\right|\\[,;!: ]|\\(?:text|mathrm|textbf|mathbf|boxed)\s*(?=\{)")
_MAX_PATTERN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Gold:
    """The reference answer in the form it is looked for."""

    text: str
    kind: str
    """`number`, `letter`, `everyday` (a common word) or `text`."""
    needs_context: bool
    """True when a bare mention says nothing."""
    number: answers.Number | None = None
    pattern: re.Pattern[str] | None = None
    """Finds the answer as text, whatever the blanks; None for a number, or an answer too long to be searched for."""


def read_gold(answer: str, question: str) -> Gold | None:
    """The answer to look for in folded texts; None for an empty one."""
    text = _WRAPPERS.sub("", fold(answer)).strip().rstrip(".")
    while text.startswith("{") and text.endswith("}") and "}" not in text[:-1]:
        text = text[1:-1].strip()
    if not text:
        return None
    spelled = [
        found.number for found in numbers_in(text) if found.spelled and (found.start, found.end) == (0, len(text))
    ]
    number = spelled[0] if spelled else answers.sole_number(fold(answer))
    if number is not None:
        is_short = number.value.denominator == 1 and abs(number.value) < 10
        return Gold(text, "number", is_short, number)
    if re.fullmatch(r"\(?[A-Za-z]\)?\.?", text):
        letter = re.sub(r"[^A-Za-z]", "", text)
        return Gold(letter, "letter", True, pattern=re.compile(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z'])"))
    if len(text) > _MAX_PATTERN_CHARS:
        return Gold(text, "text", True)
    tokens = [re.escape(token) for token in re.findall(r"\\[A-Za-z]+|\w+|[^\w\s]", text)]
    before, after = r"(?<![\w.])" if text[0].isalnum() else "", r"(?!\w|\.\d)" if text[-1].isalnum() else ""
    pattern = re.compile(before + r"(?:\s|\\[,;!: ]|\\left|\\right|\$)*".join(tokens) + after, re.I)
    everyday = text.lower() in _EVERYDAY
    needs_context = everyday or pattern.search(question) is not None
    return Gold(text, "everyday" if everyday else "text", needs_context, pattern=pattern)


def fold(text: str) -> str:
    """`text` with the digits, letters, blanks and minus signs of other alphabets in ASCII, character for character."""

    def one(char: str) -> str:
        if char.isascii():
            return char
        digit = unicodedata.decimal(char, None)
        if digit is not None:
            return str(digit)
        if unicodedata.category(char) == "Pd" or char == "\u2212":
            return "-"
        plain = char if unicodedata.category(char) == "No" else unicodedata.normalize("NFKC", char)
        return plain if len(plain) == 1 else char

    return text if text.isascii() else "".join(map(one, text))


# ---- where an answer counts as stated --------------------------------------------------------------------------------

_LINK = (
    r"(?:[\s:=,(~$*\"'`\u2248]|\\[(\[]|\b(?:is|was|be|being|are|as|to|of|equals?|equal|should|must|will|would|comes?|came|"
    r"out|exactly|just|simply|only|actually|therefore|thus|then|indeed|finally|becomes?|namely|not|about|approximately|"
    r"option|choice|letter|number|value|integer|the|a|an|that|it|have)\b)*$"
)
_RESULT = (
    r"\b(?:answers?|results?|solution|totals?|sum|product|value|output|outcome|conclusion|count|quotient|difference|"
    r"remainder|correct (?:option|choice|one))\b"
)
_STRONG = re.compile(
    rf"{_RESULT}(?:[^.;!?\n]{{0,40}}?(?:\b(?:is|was|be|equals?|gives?|becomes?)\b|[=:]))?{_LINK}", re.I
)
_STRONG_AFTER = re.compile(
    r"[\s)\]\"'`*$.,]*(?:\bis|\bwas|\bbeing|\bas|\bmust be|,)\s+(?:the|our|my)?\s*(?:final |correct |right )*"
    r"(?:answer|result|correct|right|solution)\b|\s*(?:left|remain\w*|in total|altogether)\b",
    re.I,
)
_WEAK = re.compile(
    r"(?:(?<![<>!])=|\u2248|\b(?:equals?|equal to|is|was|are|be|giv(?:es?|ing)|gave|gets?|got|getting|"
    r"yield(?:s|ed|ing)?|obtain(?:s|ed|ing)?|produc(?:es?|ed|ing)|makes?|made|becomes?|became|returns?|returned|"
    r"leav(?:es?|ing)|reach(?:es|ed)?|arriv(?:es?|ed|ing) at|comes? to|came to|finds?|found|computes?|computed|"
    r"calculated?|conclude[sd]?|cho(?:oses?|se|osing)|pick(?:s|ed|ing)?|select(?:s|ed|ing)?|mark(?:s|ed)?|go with|"
    r"went with)\b)" + _LINK,
    re.I,
)
_CONDITION = re.compile(
    r"\b(?:if|when|whether|check|set|setting|let|suppose|assume|until|unless|while|cannot)\b[^,;.\n]*$", re.I
)
_ENDS_CLAUSE = re.compile(
    r"[\s)\]\"'`*$}\\]*(?:[.,;:!?\n]|$|(?:and|because|since|so|but|as|while|when|instead|not)\b)", re.I
)
_OPERAND = re.compile(r"\s*(?:[+*/^\u00d7\u00b7]|-\s?[\d\\(]|\\(?:times|cdot|div)\b|(?:and|or|to)\s+[-$\\\d(])")
_COUNTED = re.compile(
    r"[\s-]?(?:digits?|decimals?|steps?|methods?|places?|parts?|lines?|sentences?|times|kinds?|types?|cases|terms?|rules?|"
    r"conditions?|variables?|unknowns?|sides?|constraints?|equations?|factors?|different|separate|distinct|of|or more|"
    r"more|less|thing|way|independent|possible|possibilities|quantities)\b",
    re.I,
)
_REFERENCE = re.compile(
    r"\b(?:steps?|lines?|rules?|heuristics?|parts?|sections?|equations?|eq\.|cases?|solutions?|attempts?|examples?|"
    r"problems?|figures?|tables?|paragraphs?|insights?|lessons?|principles?)\s*(?:no\.?|number|#)?\s*[(#]?$",
    re.I,
)
_IDIOM = re.compile(
    r"\b(?:base|powers? of|multiples? of|multipl(?:y|ied|ying) by|divid(?:e|ed|ing) by|divisible by|modulo|mod)\s*$",
    re.I,
)


def is_label(text: str, start: int, end: int) -> bool:
    """True for a number at [start, end) that names something: "step 12", "12th", a list marker, "base 10"."""
    line = text[:start].rpartition("\n")[2]
    after = text[end : end + 3]
    if not line.strip(" \t#*-(>") and re.match(r"[.):](?:\s|\*|$)", after):
        return True
    before = text[max(0, start - 24) : start]
    return bool(re.match(r"(?:st|nd|rd|th)\b", after) or _REFERENCE.search(before) or _IDIOM.search(before))


def is_stated(text: str, start: int, end: int, kind: str, question: str) -> bool:
    """True when what stands at [start, end) is put forward as a result, in words the question does not use itself.

    `kind`: `digits`, `unit` (0 or 1), `spelled`, `letter`, `everyday` or `text`; the commoner the mention, the more it
    takes.
    """
    before = re.split(r"[.;!?](?=\s)|\n", text[max(0, start - 64) : start])[-1]
    after = text[end : end + 40]
    quoted = " ".join(before.split()[-2:]) + text[start:end]
    if len(quoted) > end - start + 2 and _squash(quoted) in _squash(question):
        return False
    if kind in ("digits", "unit", "spelled") and (_OPERAND.match(after) or _COUNTED.match(after)):
        return False
    closes = bool(_ENDS_CLAUSE.match(after))
    strong = bool(_STRONG.search(before) or _STRONG_AFTER.match(after))
    weak = bool(_WEAK.search(before))
    if kind == "unit":
        return strong or (weak and not _CONDITION.search(before))
    if kind == "spelled":
        return closes and (strong or (weak and not _CONDITION.search(before)))
    if kind == "letter":
        return (strong or weak) and (closes or bool(_STRONG_AFTER.match(after)))
    if kind == "everyday":
        return strong and closes
    return strong or weak


def _squash(text: str) -> str:
    return "".join(text.lower().split())


__all__ = ["Gold", "Mention", "fold", "is_label", "is_stated", "numbers_in", "read_gold"]
