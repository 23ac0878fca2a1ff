"""Read an answer as a number, and compare numbers. Exact: values are fractions, and nothing is evaluated."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from fractions import Fraction

from mel_lite.verify import markup
from mel_lite.verify.extract import TEXT_COMMAND, first_sentence

TOLERANCE = Fraction(2, 10**6)
"""Largest difference between equal numbers that are not integers: absolute from 1 on, relative below 1 and if huge."""
HUGE = 10**15
"""Size from which decimals and scientific notation are compared by their relative difference."""
MAX_DIGITS = 400
"""Longest number that is read, and the largest power of ten. No honest answer exceeds it."""
_FLOAT_TOLERANCE = Fraction(1, 10**9)

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])(?:\.[0-9]++)?+|[0-9]++(?:\.[0-9]++)?+|\.[0-9]++)(?!\.[0-9])"
_NUMBER = re.compile(
    r"(?<![\w.^])(?P<sign>(?<![\w)])[-+][ ]?)?(?:[$\u20ac\u00a3\u00a5\u20b9][ ]?)?(?P<inner>-)?"
    rf"(?:(?P<whole>[0-9]{{1,9}})[ ]+(?=[0-9]+[ ]?/))?(?P<value>{_DECIMAL})(?:[ ]?/[ ]?(?P<denominator>{_DECIMAL}))?"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,4})(?![\w.])"
    r"|[ ]?(?:\*|x|[\u00d7\u00b7\u22c5\u2022]|\\times|\\cdot)[ ]?10\^\{?(?P<power>[-+]?[0-9]{1,4})\}?)?"
    r"(?:[ ]{1,3}(?P<scale>dozen|score(?!s| points?\b)|hundred|thousand|lakh|million|crore|billion|trillion)s?\b"
    r"|(?P<suffix>[kK]|[ ]?(?:k|mn|bn))\b)?"
    r"(?P<percent>[ ]?%|[ ](?:percent|pct)\b)?"
)
_SCALES = {
    "dozen": 12, "score": 20, "hundred": 10**2, "thousand": 10**3, "k": 10**3, "lakh": 10**5, "million": 10**6,
    "mn": 10**6, "crore": 10**7, "billion": 10**9, "bn": 10**9, "trillion": 10**12,
}  # fmt: skip
_AMOUNT = re.compile(
    r"(?P<amount>[$\u20ac\u00a3\u00a5\u20b9][ ]?-?[0-9][0-9,]*+(?:\.[0-9]++)?+)[ ]?(?P<scale>[kKmMbB]|M[nM])\b"
)
_AMOUNTS = {"k": "thousand", "m": "million", "mn": "million", "mm": "million", "b": "billion"}
"""Scales of `$1.5M`. Without a currency, `5 m` is a length and `5 K` a temperature."""
_FRACTION = re.compile(
    r"(?P<left>[0-9])?\s*\\[dt]?frac\s*(?:\{\s*([0-9.,]+)\s*\}\s*\{\s*([0-9.,]+)\s*\}|([0-9])([0-9]))"
)
_LATEX_NOISE = re.compile(
    r"\\[,;!:> ]|\\(?:left|right|displaystyle|q?quad|thinspace|pounds|euro|yen|textdollar|texteuro|textsterling)\b"
    r"|\^\s*\{?\\circ\}?|~|\u00b0"
)
_NAMED_UNIT = re.compile(
    r"\\(?:text|mathrm|textrm|mathit|mbox|operatorname)\s*\{([^{}]*)\}\s*\^\s*(?:\{[-0-9 ]{1,4}\}|[0-9])"
)
_POWER_IN_UNIT = re.compile(r"\\(?:text|mathrm|textrm)\s*\{([^{}]{1,20}\^\s?\{-?[0-9]\}[^{}]{0,20})\}")
"""A unit with a power inside: `\\mathrm{m\\,s^{-1}}`."""
_CURRENCY = re.compile(
    r"\b(?:US|USD|EUR|GBP|INR|Rs|CAD|AUD|JPY|CNY|RMB|HK|AU|CA|NZ)\b\.?[ ]?(?=[$\u20ac\u00a3\u00a5\u20b9]?[ ]?-?[0-9.])"
)
_LENGTH = r"(?:[mckd]?m|in|ft|yd|mi|inch(?:es)?|feet|foot|yards?|miles?|[a-z]{0,6}met(?:er|re)s?|units?)"
_UNIT = re.compile(
    rf"(?<![A-Za-z])(?:{_LENGTH}\s*(?:\^\s*(?:\{{-?[23]\}}|[23])|[\u00b2\u00b3])(?:\s?/\s?(?:s|min|h|hr|day)\b)?"
    r"|(?:[ckm]?m|[mk]?g|mol|rad|[ckm]?[NJWLC])\s*(?:s|min|h|m|kg|mol|K)\s*\^\s*(?:\{\s*-[12]\s*\}|-[12])"
    r"|(?:[a-z]{2,12}|[mgsLJNWVA])\s*/\s*(?:[a-z]{2,12}|[hsmgL]|kg)\b\s*(?:\^\s*(?:\{[23]\}|[23])|[\u00b2\u00b3])?)"
)
_POWER_OF_TEN = re.compile(
    r"(?P<times>(?:\*|x|[\u00d7\u00b7\u22c5\u2022]|\\times|\\cdot)\s?)?(?<![\w.^}])10\s?\^\s?"
    r"(?:\{\s?(?P<braced>[-+]?[0-9]{1,4})\s?\}|(?P<bare>[-+]?[0-9]{1,4}))"
    r"(?![\w.^])"
)
_ORDINAL = re.compile(r"(?<=[0-9])(?:st|nd|rd|th)\b")
_NEGATIVE = re.compile(r"\b(?:minus|negative)[ ]+(?=[$\u20ac\u00a3]?[0-9])", re.IGNORECASE)
_NOT_A_NUMBER = re.compile(
    r"[\\^*/+<>\u2264\u2265\u221a\u03c0\[\]{}|\u00b2\u00b3\u2260\u00b1\u2030\u0305\u2080-\u2089]"
    r"|\b(?:pi|sqrt|i|per mille|binary|octal|hex(?:adecimal)?)\b"
)
_VARIABLE = re.compile(
    r"[0-9](?:[abefijnpqrtuvwxyz]\b(?![-+][0-9])|(?!cc\b)(?:[abcxyz]{2,4}|pqr?|qr|uvw?)\b)"
    r"|[0-9] (?:[exyz]|(?!cc|by)[abcxyz]{2})\b(?![ ]?[0-9])"
)
_OTHER_NOTATION = re.compile(
    r"\b(?:a(?:rc)?)?(?:sin|cos|tan|sec|csc|cot|log|ln|exp)h?[ ]?\(?[ ]?-?[0-9]"
    r"|[0-9][ ]?(?:sin|cos|tan|log|ln)[ (]{1,2}[a-z]\b"
    r"|(?<![A-Za-z])[A-Za-z]\([ ]?-?[0-9.]+[ ]?\)"
    r"|[0-9](?:_[0-9{]|[rR][0-9])|\b0[xXbBoO][0-9A-Fa-f]|[-+][ ]?[-+][ ]?[0-9]"
)
"""A function of the number (`log 5`, `f(5)`), another base (`1010_2`, `0x10`), a remainder (`3r2`), two signs."""
_BEFORE = (
    r"at (?:least|most)|(?:more|less|fewer|greater|larger|smaller|bigger|higher|lower|other) than|up to|no more than"
    r"|between|above|below|over|under|beyond|exceed(?:s|ing)?|almost|nearly"
    r"|twice|thrice|doubled?|tripled?|half|(?:half|third|quarter|square|cube|root|opposite|reciprocal|inverse) of"
)
_AFTER = (
    r"squared|cubed|factorial|root of"
    r"|(?:[a-z]{1,15} ){0,2}(?:(?:below|under|less than) (?:zero|freezing)|at (?:most|least)"
    r"|(?:or|and) (?:more|less|fewer|above|below|over|under|greater|higher|lower|larger|smaller|up)"
    r"|(?:is|was) (?:wrong|incorrect|false|impossible|excluded))"
)
_NO_STATEMENT = re.compile(
    r"\b(?:not|never|neither|nor|except|unknown|undefined|i doubt|no (?:real )?solutions?"
    r"|(?:any|every)thing but|(?:is|was|are|does|do|did|can|could)n['\u2019]t|cannot"
    rf"|(?:{_BEFORE})\s{{1,3}}[$\u20ac\u00a3]?[0-9])|[0-9] (?:{_AFTER})\b|\((?:wrong|incorrect|false)\)",
    re.IGNORECASE,
)
"""A denial, a bound or a calculation: `not 5`, `at least 5`, `5 or more` and `twice 5` do not state the number 5."""
_BECAUSE = re.compile(r"(?<=[0-9a-z%)$])[,;]?\s(?:because|since)\s.*", re.DOTALL)
_CONTRAST = re.compile(r"\s?[,;(]\s?(?:and |but )?(?:not|rather than) [^,;()]{1,30}\)?\W{0,3}$")
"""The end of `7, not 8`, which does state 7."""
_INSTEAD = re.compile(r"^\W{0,3}not [^,;()]{1,30}?,? (?:but|rather) (?=[^,;]*[0-9])")
"""The beginning of `not 7 but 8`."""
_WORDS = {
    word: str(value)
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {
    word: 10 * value
    for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
_PARTS = {
    word: str(parts)
    for parts, word in (
        (2, "half"), (2, "halve"), (3, "third"), (4, "quarter"), (4, "fourth"), (5, "fifth"), (6, "sixth"),
        (7, "seventh"), (8, "eighth"), (9, "ninth"), (10, "tenth"), (100, "hundredth"), (1000, "thousandth"),
    )
}  # fmt: skip
_LARGE = {name: scale for name, scale in _SCALES.items() if len(name) > 2 and name != "hundred"}
_SPELLED = re.compile(
    rf"(?:(?P<small>{'|'.join(_WORDS)})|an?)[- ](?P<part>{'|'.join(_PARTS)})s?|half an? (?P<half>{'|'.join(_LARGE)})"
)
_MAX_NUMBER_WORDS = 20
_COINS = re.compile(r"(?<=[0-9]) (dollars?|euros?|pounds?)(?: and|,)? (?P<coins>[0-9]{1,2}) (?:cents?|pence)\b")
_TENTHS = re.compile(
    r"(?<![0-9/.,])(?P<count>[0-9]{1,9}) (?P<part>third|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s\b"
)
"""`5 tenths`. Quarters are coins, too, and halves the parts of a match."""
_SCALE_NAMES = "|".join((*_LARGE, "hundred"))
_SCALE_AND_REST = re.compile(
    rf"(?<![\w.,/])(?P<count>[0-9]{{1,9}}) (?P<scale>{_SCALE_NAMES})s? and (?P<rest>[0-9]{{1,9}})\b"
    rf"(?![.,/]?[0-9]|[ ]?[%^/]|[ ](?:{_SCALE_NAMES}|percent)\b)"
)
"""`3 million and 5`, whose rest is smaller than its scale."""
_COMPARED = ((re.compile(r"!=|=/=|<>"), "\u2260"), (re.compile("<="), "\u2264"), (re.compile(">="), "\u2265"))
_BASE_TEN = re.compile(r"(?<=[0-9])(?:_(?:10|\{10\})|\u2081\u2080)(?![0-9\u2080-\u2089])")
_REPEATING = re.compile(
    r"(?<![0-9.])(?P<whole>[0-9]{1,9})\.(?P<fixed>[0-9]{0,9}?)"
    r"(?:\\overline[ ]?\{(?P<bar>[0-9]{1,9})\}|\((?P<bracketed>[0-9]{1,9})\)"
    r"|(?P<cycle>[0-9]{1,3}?)(?P=cycle){2,9}(?P<cut>[0-9]{0,2})(?:\.\.\.|\u2026|\\[lc]?dots))(?![0-9])"
)
_CALCULATION = re.compile(r"[-+*/x\u00d7\u00f7^(). 0-9]+")
_GROUPED = re.compile(r"[^0-9]{0,40}?(?<![0-9.,])[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9])(?:\.[0-9]+)?[^0-9]*")
_BRACKETED = re.compile(r"\s*[\[({]\s*([^\[\](){},]*)[\])}]\s*")


@dataclass(frozen=True, slots=True)
class Number:
    """Number as an answer states it: `50%` is (50, percent)."""

    value: Fraction
    percent: bool = False
    rounded: bool = field(default=False, compare=False)
    """True for scientific notation and `2 million`, whose digits are those that are known."""


def same_number(left: Number, right: Number) -> bool:
    """Return True for equal numbers: exactly for two integers, else within TOLERANCE.

    If only one has a percent sign, `50%` equals both 50 and 0.5.
    """
    if left.percent != right.percent:
        as_share, plain = (left, right) if left.percent else (right, left)
        return _close(as_share.value, plain.value) or _close(as_share.value / 100, plain.value)
    return _close(left.value, right.value, exact=not (left.rounded or right.rounded))


def _close(left: Fraction, right: Fraction, *, exact: bool = True) -> bool:
    size = max(abs(left), abs(right))
    if left.denominator == right.denominator == 1 and (exact or size < HUGE):
        return left == right
    allowed = TOLERANCE * size if size < 1 or size >= HUGE else max(TOLERANCE, _FLOAT_TOLERANCE * size)
    return abs(left - right) <= allowed


def last_number(text: str) -> Number | None:
    """Return the last number in the last 2,000 characters of the text."""
    text = _without_latex(text[-2_000:])
    return next((number for match in reversed(list(_NUMBER.finditer(text))) if (number := _read(match))), None)


def sole_number(text: str) -> Number | None:
    """Return the only number the text states after its last `=`. None for several, a bound, a denial or a formula.

    In `7 = 3 + 4` the calculation is the reason. A number in words (`forty-two`) must be the whole text.
    """
    if len(text) > 2_000:
        return None
    text = _CONTRAST.sub("", _without_latex(spelled_out(_BECAUSE.sub("", first_sentence(text)))))
    text = _INSTEAD.sub("", text)
    sides = re.split(r"=|\u2248|\\approx|\\equiv", text)
    found = _only_number(spelled_out(sides[-1]))
    if found is None and len(sides) == 2 and _CALCULATION.fullmatch(sides[1]):
        return _only_number(sides[0])
    return found


def _only_number(text: str) -> Number | None:
    if bracketed := _BRACKETED.fullmatch(text):
        text = bracketed[1]
    if _GROUPED.fullmatch(text):
        text = re.sub(r"(?<=[0-9]) (?=[0-9])", "", text)
    matches = list(_NUMBER.finditer(text))
    numbers = {_read(match) for match in matches}
    if len(numbers) != 1 or any(pattern.search(text) for pattern in (_VARIABLE, _NO_STATEMENT, _OTHER_NOTATION)):
        return None
    if any(text[one.end() : other.start()].isspace() for one, other in itertools.pairwise(matches)):
        return None
    if _NOT_A_NUMBER.search(_NUMBER.sub(" ", text)):
        return None
    return numbers.pop()


def spelled_out(text: str) -> str:
    """Return digits for a text that is only a number in words (`Forty-two`, `two thirds`, `a dozen`); others stay."""
    words = markup.strip(TEXT_COMMAND.sub(r"\1", text)).casefold()
    if (found := _SPELLED.fullmatch(words)) is not None:
        if found["half"]:
            return str(_LARGE[found["half"]] // 2)
        return f"{_WORDS[found['small'] or 'one']}/{_PARTS[found['part']]}"
    number, percent, rest = words.partition(" percent")
    value = None if rest else _count(number.replace("-", " ").split())
    return text if value is None else f"{value}{'%' if percent else ''}"


def _count(words: list[str]) -> int | None:
    """Return the number that `words` spell, such as `two thousand five hundred and six`, or None."""
    if not 0 < len(words) <= _MAX_NUMBER_WORDS:
        return None
    total, group, scale = 0, 0, 10**15
    for i, word in enumerate(words):
        open_below = 100 if group == 0 or group % 100 == 0 else 10 if group % 10 == 0 and group % 100 >= 20 else 0
        if word == "and" and group + total and i + 1 < len(words):
            continue
        if word in ("a", "an") and i == 0 and len(words) > 1 and words[1] in ("hundred", *_LARGE):
            group = 1
        elif word in _WORDS and int(_WORDS[word]) < open_below and (word != "zero" or len(words) == 1):
            group += int(_WORDS[word])
        elif word in _TENS and open_below == 100:
            group += _TENS[word]
        elif word == "hundred" and 0 < group < 100:
            group *= 100
        elif word in _LARGE and group and _LARGE[word] < scale:
            scale = _LARGE[word]
            total, group = total + group * scale, 0
        else:
            return None
    return total + group


def denies(text: str) -> bool:
    """Return True when the text denies or bounds what it names (`not 5`, `at least 5`) rather than states it."""
    return _NO_STATEMENT.search(_CONTRAST.sub("", _without_latex(text))) is not None


def _without_latex(text: str) -> str:
    """Rewrite LaTeX fractions as plain text and remove LaTeX spacing, currencies and units."""
    text = _one_notation(markup.join_groups(markup.join_thousands(markup.plain(text))))
    for latex, plain in (("\\$", "$"), ("\\%", "%"), ("\\(", " "), ("\\)", " "), ("\\[", " "), ("\\]", " ")):
        text = text.replace(latex, plain)
    text = TEXT_COMMAND.sub(r" \1 ", _NAMED_UNIT.sub(r" \1 ", _POWER_IN_UNIT.sub(r" \1 ", text)))
    text = _UNIT.sub(" ", _CURRENCY.sub("", _LATEX_NOISE.sub(" ", text)))
    text = _NEGATIVE.sub("-", _ORDINAL.sub("", text))
    text = _POWER_OF_TEN.sub(
        lambda match: match[0] if match["times"] else f"1e{match['braced'] or match['bare']}", text
    )

    def fraction(match: re.Match[str]) -> str:
        left = f"{match['left']} " if match["left"] else ""
        return f"{left}{match[2] or match[4]}/{match[3] or match[5]}"

    return _FRACTION.sub(fraction, text)


def _one_notation(text: str) -> str:
    """Write comparisons, powers, scales and repeating decimals in the one way that the other patterns know."""
    for written, sign in _COMPARED:
        text = written.sub(sign, text)
    text = markup.powers(_BASE_TEN.sub("", text)).replace("10**", "10^")
    text = _COINS.sub(lambda match: f".{match['coins']:0>2} {match[1]}", text)
    text = _AMOUNT.sub(lambda match: f"{match['amount']} {_AMOUNTS[match['scale'].lower()]}", text)
    text = _SCALE_AND_REST.sub(_scale_and_rest, text)
    text = _TENTHS.sub(lambda match: f"{match['count']}/{_PARTS[match['part']]}", text)

    def fraction(match: re.Match[str]) -> str:
        cycle = match["bar"] or match["bracketed"] or match["cycle"]
        if match["cut"] and not cycle.startswith(match["cut"]):
            return match[0]
        fixed = f"{match['whole']}{match['fixed']}"
        nines = (10 ** len(cycle) - 1) * 10 ** len(match["fixed"])
        return f"{int(fixed + cycle) - int(fixed or 0)}/{nines}"

    return _REPEATING.sub(fraction, text)


def _scale_and_rest(match: re.Match[str]) -> str:
    scale, rest = _SCALES[match["scale"]], int(match["rest"])
    return str(int(match["count"]) * scale + rest) if rest < scale else match[0]


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
    scale = match["scale"] or (match["suffix"] or "").strip().lower()
    value = (value + int(match["whole"] or 0)) * Fraction(10) ** power * _SCALES.get(scale, 1)
    negative = (match["sign"] or "").startswith("-") != (match["inner"] is not None)
    return Number(-value if negative else value, match["percent"] is not None, bool(power or scale))
