"""Find mentions of a reference answer in a text, and decide if a mention states it as the result.

Numbers are found in any notation. An answer that is too short to be specific (one digit, one letter, an everyday word),
or that the question itself mentions, counts only in a context that presents it as the result: "= 7", "the answer is B".
Every pass is linear: patterns around a mention see a window of fixed size.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from mel_lite.verify import numbers

# ---- numbers ---------------------------------------------------------------------------------------------------------

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORD_VALUES = {word: value for value, word in enumerate(_SMALL)} | {w: 20 + 10 * i for i, w in enumerate(_TENS)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_SPELLED = "|".join([*_WORD_VALUES, *_SCALES])
_SHARE_VALUES = {"half": 2, "halve": 2, "quarter": 4, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
_SHARE_VALUES |= {"eighth": 8, "ninth": 9, "tenth": 10}
_SHARES = "|".join(f"{name}s?" for name in _SHARE_VALUES)
_NUMBER = re.compile(
    rf"""\\[dtc]?frac\s?(?:\{{\s?(?P<p>-?\d{{1,12}})\s?\}}\s?\{{\s?(?P<q>\d{{1,12}})\s?\}}|(?P<p1>\d)(?P<q1>\d))
    |(?P<vulgar>[\u00bc-\u00be\u2150-\u215e])
    |(?<![\d./])(?:(?P<whole>\d{{1,6}})[ ])?(?P<p2>\d{{1,12}})\s?/\s?(?P<q2>\d{{1,12}})(?![\d/])
    |\b(?P<part>(?:an?(?=[ ](?:half|quarter))|one|two|three|four|five|six|seven|eight|nine)[ -](?:{_SHARES})\b)
    |(?P<digits>(?<![\d.])(?:\d{{1,3}}(?:(?:,|\{{,\}}|\\,|\\!|_)\d{{3}}){{1,12}}(?!\d)|\d{{1,40}})(?:\.\d{{1,40}})?(?:e[+-]?\d{{1,2}})?
      |(?<![\d.])\.\d{{1,40}})
    |(?P<words>\b(?:{_SPELLED})(?:(?:[ \t-]|[ ]and[ ])(?:{_SPELLED})){{0,11}}\b)""",
    re.I | re.X,
)
_SIGN = re.compile(r"(?:-|\bminus |\bnegative )$", re.I)
_MINUEND = re.compile(r"(?:[\w)\]}]|(?:[\d)\]}]|\b[A-Za-z])[ ])$")
"""Matches text that makes the following sign a subtraction: adjacent text, or a number or variable and a blank."""
_PERCENT = re.compile(r"\s?(?:\\?%|per ?cent\b)", re.I)


@dataclass(frozen=True, slots=True)
class Mention:
    """Number in a text, with its position."""

    start: int
    end: int
    number: numbers.Number
    form: str
    """Notation without separators: `1234`, `3/4`, `75%`."""
    decimals: int
    spelled: bool

    def means(self, gold: numbers.Number) -> bool:
        """Return True for the same number, also as percent or share, or its rounding to 3 or more decimals."""
        if self.number.percent != gold.percent:
            share, other = (self.number, gold) if self.number.percent else (gold, self.number)
            return share.value == other.value or (share.value / 100 == other.value and other.value.denominator != 1)
        gap = abs(self.number.value - gold.value)
        return gap == 0 or (self.decimals >= 3 and 2 * gap * 10**self.decimals <= 1)


def numbers_in(text: str) -> Iterator[Mention]:
    """Yield every number in a folded text: digits with separators, decimals, fractions, LaTeX, percent, spelled out."""
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
        form = "/".join(part for part in match.group("whole", "p", "p1", "p2", "q", "q1", "q2") if part) or str(value)
        number = numbers.Number(value, percent is not None)
        yield Mention(start, end, number, form + "%" * number.percent, decimals, bool(match["words"] or match["part"]))


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
    if match["part"]:
        top, bottom = re.findall("[a-z]+", match["part"].lower())
        return Fraction(_WORD_VALUES.get(top, 1), _SHARE_VALUES[bottom.removesuffix("s")])
    if match["vulgar"]:
        return Fraction(unicodedata.numeric(match["vulgar"])).limit_denominator(100)
    if match["digits"]:
        return Fraction(re.sub(r"[,{}\\!_]", "", match["digits"]))
    top, bottom = match["p"] or match["p1"] or match["p2"], match["q"] or match["q1"] or match["q2"]
    return int(match["whole"] or 0) + Fraction(int(top), int(bottom)) if int(bottom) else None


# ---- the answer ------------------------------------------------------------------------------------------------------

_EVERYDAY = frozenset(
    "yes no not true false even odd positive negative zero none never always increasing decreasing left right up down "
    "both neither equal more less first second last possible impossible valid invalid correct incorrect greater "
    "smaller same different all infinite undefined unknown a an the it and or".split()
)
_WRAPPERS = re.compile(r"\$|\\left|\\right|\\[,;!: ]|\\(?:text|mathrm|textbf|mathbf|boxed)\s*(?=\{)")
_FUNCTION = re.compile(r"!|\b(?:log|ln|exp|sin|cos|tan|sqrt|mod)\b")
_MAX_PATTERN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Gold:
    """Reference answer, prepared for the search."""

    text: str
    kind: str
    """`number`, `letter`, `everyday` (a common word) or `text`."""
    needs_context: bool
    """True if a mention counts only in a context that states it as the result."""
    number: numbers.Number | None = None
    pattern: re.Pattern[str] | None = None
    """Matches the answer as text with any white space; None for a number, or an answer too long to search for."""


def read_gold(answer: str, question: str) -> Gold | None:
    """Prepare an answer for the search in folded texts. Returns None for an empty one."""
    text = _WRAPPERS.sub("", fold(answer)).strip().rstrip(".")
    while text.startswith("{") and text.endswith("}") and "}" not in text[:-1]:
        text = text[1:-1].strip()
    if not text:
        return None
    spelled = [
        found.number for found in numbers_in(text) if found.spelled and (found.start, found.end) == (0, len(text))
    ]
    number = spelled[0] if spelled else None if _FUNCTION.search(text) else numbers.sole_number(fold(answer))
    if number is not None:
        is_short = number.value.denominator == 1 and abs(number.value) < 10
        return Gold(text, "number", is_short, number)
    if re.fullmatch(r"\(?[A-Za-z]\)?\.?", text):
        letter = re.sub(r"[^A-Za-z]", "", text)
        return Gold(letter, "letter", True, pattern=re.compile(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z'])"))
    if len(text) > _MAX_PATTERN_CHARS:
        return Gold(text, "text", True)
    tokens = [
        r"(?:,\s*and\b|,|\band\b)" if token == "," else re.escape(token)
        for token in re.findall(r"\\[A-Za-z]+|\w+|[^\w\s]", text)
    ]
    before, after = r"(?<![\w.])" if text[0].isalnum() else "", r"(?!\w|\.\d)" if text[-1].isalnum() else ""
    pattern = re.compile(before + r"(?:\s|\\[,;!: ]|\\left|\\right|\$)*".join(tokens) + after, re.I)
    everyday = text.lower() in _EVERYDAY or not re.search(r"\w", text)
    needs_context = everyday or pattern.search(question) is not None
    return Gold(text, "everyday" if everyday else "text", needs_context, pattern=pattern)


def fold(text: str) -> str:
    """Convert digits, letters, blanks and minus signs of other alphabets to ASCII, character by character.

    The result has the same length, so positions are the same in both texts.
    """

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


# ---- contexts in which an answer counts as stated --------------------------------------------------------------------

_LINK = (
    r"(?:[\s:=,(~$*\"'`\u2248-]|\\[(\[]|\b(?:is|was|be|been|being|are|as|to|of|equals?|equal|should|must|will|would|have|"
    r"comes?|came|turns?|out|exactly|just|simply|only|actually|therefore|thus|then|indeed|finally|becomes?|namely|about|"
    r"approximately|option|choice|letter|number|value|integer|the|a|an|that|it|in fact)\b)*$"
)
"""Matches words and signs that may occur between a verb or noun and its value."""
_RESULT = (
    r"\b(?:(?:ans(?:wers?)?|results?|solution|totals?|sum|product|value|output|outcome|conclusion|count|quotient|difference|"
    r"remainder)\b|(?:correct|right)(?: (?:option|choice|one))?\s*:|correct (?:option|choice|one)\b)"
)
_STRONG = re.compile(
    rf"{_RESULT}(?:[^.;!?\n]{{0,40}}?(?:\b(?:is|was|be|equals?|gives?|becomes?)\b|[=:]))?{_LINK}", re.I
)
_STRONG_AFTER = re.compile(
    r"\s*(?:works|fits|is what)\b|"
    r"[\s)\]\"'`*$.,]*(?:\bis|\bwas|\bbeing|\bas|\bmust be|,)\s+(?:the|our|my)?\s*(?:final |correct |right )*"
    r"(?:answer|result|correct|right|solution)\b|\s*(?:[a-z]{2,12}\s+)?"
    r"(?:(?:are |is )?left|remain\w*|in total|altogether)\b",
    re.I,
)
_BEING = r"\b(?:is|was|are|be|been|(?:it|that|there|this|which)['\u2019]s)\b"
_WEAK = re.compile(
    rf"(?:{_BEING}|(?<![<>!])=>?|\u2248|->|\u2192|\u21d2|\\(?:to|implies|(?:R|r)ightarrow)\b|\b(?:equals?|equal to|"
    r"giv(?:es?|ing)|gave|gets?|got|getting|obtain(?:s|ed|ing)?|yield(?:s|ed|ing)?|produc(?:es?|ed|ing)|makes?|made|"
    r"becomes?|became|returns?|returned|leav(?:es?|ing)|left with|reach(?:es|ed)?|f(?:inds?|ound)|comput(?:es?|ed)|"
    r"calculate[sd]?|conclude[sd]?|writes?|wrote|says?|said|states?|reports?|reported|outputs?|answered|written|hence|thus|"
    r"therefore|so|instead of|rather than|results? in|resulted in|lead(?:s|ing)? to|led to|arriv(?:es?|ed|ing) at|"
    r"(?:com(?:es?|ing)|came|works?|adds?|amounts?|ends?|ended|turns?|turned) (?:out |up )?(?:to|as|at|with|in)|"
    r"(?:evaluat|simplif|reduc|boil|drop)[a-z]* (?:down )?to|cho(?:oses?|se|osing)|pick(?:s|ed|ing)?|"
    r"select(?:s|ed|ing)?|mark(?:s|ed)?|go (?:with|for)|went (?:with|for))\b)" + _LINK,
    re.I,
)
_ONLY_BEING = re.compile(_BEING + r"\s*$", re.I)
_NAMED = re.compile(r"\b(?:is|was|be|been|equals?|gives?|becomes?)\b|[=:]", re.I)
_CONDITION = re.compile(
    r"\b(?:if|when|whether|check|set|setting|let|suppose|assume|until|unless|while|cannot|not|so that)\b[^,;.\n]*$",
    re.I,
)
_ENDS_CLAUSE = re.compile(
    r"[\s)\]\"'`*$}\\]*(?:[.,;:!?\n]|$|(?:and|because|since|so|but|as|while|when|instead|not)\b)", re.I
)
_OPERAND = re.compile(r"\s*(?:[+*/^\u00d7\u00b7]|-\s?[\d\\(]|\\(?:times|cdot|div)\b|(?:and|or|to)\s+[-$\\\d(])")
_COUNTED = re.compile(
    r"[\s-]?(?:digits?|decimals?|steps?|methods?|places?|parts?|lines?|sentences?|times|kinds?|types?|cases|terms?|rules?|"
    r"conditions?|variables?|unknowns?|sides?|constraints?|equations?|factors?|items?|different|separate|distinct|of|"
    r"or more|more|less|things?|way|independent|possible|possibilities|quantities|signs?|roots)\b",
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
    """Return True for a number at [start, end) that is a label: "step 12", "12th", a list marker, "base 10"."""
    line = text[:start].rpartition("\n")[2]
    after = text[end : end + 3]
    if not line.strip(" \t#*-(>") and re.match(r"\d{1,2}[.):](?:\s|\*|$)", text[start : end + 2]):
        return True
    before = text[max(0, start - 24) : start]
    return bool(re.match(r"(?:st|nd|rd|th)\b", after) or _REFERENCE.search(before) or _IDIOM.search(before))


def is_stated(text: str, start: int, end: int, kind: str, question: str) -> bool:
    """Return True when the mention at [start, end) is presented as a result, in words other than the question's.

    Args: `kind`, one of `digits`, `spelled`, `unit` and `spelled unit` (0 or 1), `letter`, `everyday` or `text`. Common
        kinds of mentions need a stronger context.
    """
    before = re.split(r"[.;!?](?=\s)|\n", text[max(0, start - 64) : start])[-1]
    after = text[end : end + 40]
    quoted = " ".join(before.split()[-2:]) + text[start:end]
    if len(quoted) > end - start + 2 and squash(quoted) in squash(question):
        return False
    if kind not in ("letter", "everyday", "text") and (_OPERAND.match(after) or _COUNTED.match(after)):
        return False
    closes = bool(_ENDS_CLAUSE.match(after))
    after_says = bool(_STRONG_AFTER.match(after))
    strong = _STRONG.search(before)
    weak = bool(_WEAK.search(before))
    conditional = bool(_CONDITION.search(before))
    if kind.endswith("unit"):
        # "Probabilities sum to 1", "if the divisor is 0" and "it made zero checks" do not state an answer.
        stated = (strong is not None and bool(_NAMED.search(strong[0]))) or (weak and not conditional)
        return after_says or (stated and (closes or kind == "unit"))
    if kind == "digits":
        is_count = conditional and re.match(r"\s+[a-z]{3}", after) is not None  # "if there are 5 apples"
        return after_says or strong is not None or (weak and not is_count)
    if kind == "spelled":
        stated = strong is not None or (weak and not conditional)
        return after_says or (stated and (closes or not _ONLY_BEING.search(before)))
    if kind == "letter":
        return (strong is not None or weak or after_says) and (closes or after_says)
    if kind == "everyday":
        return strong is not None and closes
    return after_says or strong is not None or weak


def squash(text: str) -> str:
    """Return `text` in lower case without white space."""
    return "".join(text.lower().split())


__all__ = ["Gold", "Mention", "fold", "is_label", "is_stated", "numbers_in", "read_gold", "squash"]
