"""Compare the words of two short answers: units and names that differ make different answers."""

from __future__ import annotations

import re

from mel_lite.verify import markup
from mel_lite.verify.extract import TEXT_COMMAND

_SYNONYMS: dict[str, str] = {
    synonym: unit
    for unit, synonyms in {
        "meter": "m metre", "kilometer": "km kilometre", "centimeter": "cm centimetre", "millimeter": "mm millimetre",
        "inch": "in inche", "foot": "ft feet", "yard": "yd", "mile": "mi", "gram": "g", "kilogram": "kg kilo",
        "milligram": "mg", "pound": "lb gbp", "ounce": "oz", "liter": "l litre", "milliliter": "ml millilitre",
        "second": "sec s", "minute": "min", "hour": "hr h", "degree": "deg", "dollar": "usd buck", "euro": "eur",
        "cent": "ct", "rupee": "inr r", "yen": "jpy", "person": "people", "child": "children", "man": "men",
        "woman": "women", "mouse": "mice", "tooth": "teeth", "penny": "pennie pence", "january": "jan",
        "february": "feb", "march": "mar", "april": "apr", "june": "jun", "july": "jul", "august": "aug",
        "september": "sep sept", "october": "oct", "november": "nov", "december": "dec", "am": "", "pm": "",
        "newton": "n", "joule": "j", "watt": "w", "volt": "v", "percent": "", "kmh": "kph", "mph": "",
    }.items()
    for synonym in (unit, *synonyms.split())
}  # fmt: skip
_FILLERS = frozenset(
    "a an the is are was were be of in to at for on with and or total totals altogether answer final value result "
    "equals equal approximately about roughly around exactly just only therefore thus so hence there that this which "
    "has have had he she it they we i you his her their its left remaining each per all my your our per "
    "unit hundred thousand million billion trillion st nd rd th equation solution number sum x y z n".split()
)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi max min gcd lcm mod inf oo lim "
    "frac infinity emptyset union dfrac tfrac deg det dim ker cup cap left right infty".split()
)
_COMMAND = re.compile(r"\\[A-Za-z]+|\\.")
_SYMBOLS = (
    ("\u20ac", " euro "),
    ("\u00a3", " pound "),
    ("\u00a5", " yen "),
    ("\u20b9", " rupee "),
    (r"\$", " dollar "),
)
_SQUARED = re.compile(r"(?<=[A-Za-z}])\s?(?:\^\s?(?:\{2\}|2)|\u00b2)|\b(?:square|sq)\b(?!\s*root)")
_CUBED = re.compile(r"(?<=[A-Za-z}])\s?(?:\^\s?(?:\{3\}|3)|\u00b3)|\bcubic\b")
_LETTERS = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")
_CLOCK = re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE)
_RATE = re.compile(r"\b(km|miles?|kilomet(?:er|re)s?)\s*(?:/\s*h(?:r|our)?|per\s+hour|an\s+hour)\b", re.IGNORECASE)


def words_of(text: str) -> frozenset[str]:
    """Return the telling words of a short answer in one form: no articles, no names of functions, no plurals.

    Letters that touch digits or operators are variables, not words; letters in `\\text{}` always are words.
    """
    text = markup.plain(text)
    for symbol, name in _SYMBOLS:
        text = text.replace(symbol, name)
    text = _SQUARED.sub(" squared ", _CUBED.sub(" cubed ", text))
    text = _CLOCK.sub(r"\1m", _RATE.sub(lambda match: "mph" if match[1].lower().startswith("mi") else "kmh", text))
    quoted = " ".join(TEXT_COMMAND.findall(text))
    bare = _COMMAND.sub(" ", TEXT_COMMAND.sub(" ", text).replace("\\%", "%"))
    found = {_form(word) for word in _LETTERS.findall(quoted)}
    for match in _LETTERS.finditer(bare):
        before, after = bare[: match.start()][-1:], bare[match.end() :][:1]
        known = match[0].lower() in _SYNONYMS and (before.isspace() or before.isdigit())
        if known or (
            len(match[0]) > 2
            and (before or " ") not in "0123456789^*/+-_=({"
            and (after or " ") not in "0123456789^*/+=_(["
        ):
            found.add(_form(match[0]))
    return frozenset(found - _FILLERS - _FUNCTIONS - {""})


def words_differ(text: str, gold: str) -> bool:
    """Return True when both have words, and the words of `gold` are not among those of `text`."""
    wanted, given = words_of(gold), words_of(text)
    powers = {"squared", "cubed"}
    if not wanted - powers or not given - powers:
        return False
    return not wanted <= given or wanted & powers != given & powers


def names_something(text: str) -> bool:
    """Return True when a word precedes the number: `May 5`, `Team 2`. A unit follows its number, as in `5 apples`."""
    first = re.search(r"[0-9]", text)
    return first is not None and bool(words_of(text[: first.start()].replace("\\$", "")))


def _form(word: str) -> str:
    word = word.casefold()
    if word in _SYNONYMS:
        return _SYNONYMS[word]
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    return _SYNONYMS.get(word, word)
