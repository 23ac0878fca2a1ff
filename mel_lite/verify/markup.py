r"""Remove what surrounds an answer without being part of it: emphasis, code marks, quotes, tags, LaTeX spacing.

Every pass is linear in the length of the text.
"""

from __future__ import annotations

import re

_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_ATTACHED = re.compile("(?<![^\\W\\d_])([^\\W\\d_])(?=[\u00bc-\u00be\u2153-\u215e])")
"""A variable in front of a one-character fraction, its factor."""
_RAISED = re.compile("(?<=[0-9)])[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_RAISED_SIGNS = str.maketrans(
    "\u207a\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "+-0123456789"
)
_FULL_WIDTH = {0xFF01 + i: 0x21 + i for i in range(94)}
_VULGAR = {
    ord(sign): f" {value}"
    for sign, value in zip(
        "\u00bc\u00bd\u00be\u2153\u2154\u2155\u2156\u2157\u2158\u2159\u215a\u215b\u215c\u215d\u215e",
        "1/4 1/2 3/4 1/3 2/3 1/5 2/5 3/5 4/5 1/6 5/6 1/8 3/8 5/8 7/8".split(),
        strict=True,
    )
}
"""One-character fractions, with a space before, so that `3\u00bd` is `3 1/2`."""
_PLAIN = _FULL_WIDTH | _VULGAR | {0x2212: "-", 0x2013: "-", 0xA0: " ", 0x202F: " ", 0x2009: " ", 0x3002: "."}

_STRUCK = re.compile(r"~~[^~\n]{1,300}~~")
_TAG = re.compile(r"</?(?:b|strong|i|em|u|mark|code|span|big|center|p)(?:\s[^<>\n]{0,100})?>", re.IGNORECASE)
_BREAK = re.compile(r"<br\s{0,9}/?>", re.IGNORECASE)
_COLOR = re.compile(r"\\(?:text)?color\s?\{[A-Za-z]{1,20}\}")
_BOLD_SYMBOL = re.compile(r"\\(?:boldsymbol|bm|pmb)\s*(?=\{)")
_SIUNITX = re.compile(r"\\(?:SI|qty|num|unit)\{([^{}]{1,60})\}(?:\{[^{}]{0,60}\})?")
_OPENING = re.compile(r"(?:(?<=[\s(\[{\"'>:,=$~|\u201c\u2018])|^)(?:\*{2,3}|_{2,3})(?=[^\s*_])", re.MULTILINE)
_CLOSING = re.compile(
    r"(?<=[^\s*_])(?:\*{2,3}|_{2,3})(?:[!,;]+(?=\s*$)|(?=[\s.,;:!?)\]}\"'$|<\u2014\u201d\u2019]|$))",
    re.MULTILINE,
)
_LABEL = re.compile(r"(?<=\w)(\s{0,2})\*\*(?=\s{0,2}[:=])|(?<=[:=])\*\*")
_SINGLE = re.compile(
    r"(?:(?<=[\s(\[{\"'>:,=$|])|^)(?P<mark>[*_])(?=[^\s*_])(?P<inside>[^*_\n]+)(?<=[^\s*_])(?P=mark)"
    r"(?=[\s.,;:!?)\]}\"'$|<\u2014]|$)",
    re.MULTILINE,
)
_AT_ENDS = " \t\r\n*`_"
QUOTES = "\"'\u201c\u201d\u2018\u2019\u00ab\u00bb\u201e"
_THOUSANDS = (
    re.compile(
        r"(?<=\d)(?:\{,\}(?:\\!)*|,(?:\\!)+[ ]?"
        r"|(?:\\[,:;> ]|\\(?:thin|med|thick|en)space(?![A-Za-z])|\\hspace\*?\{[^{}]{1,12}\}|~)[ ]?)(?=\d{3}(?!\d))"
    ),
    re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:\\![ ]?\d{3})+)(?!\d)"),
)
_UNDERSCORES = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?:_\d{3})+(?![\w])")
_APOSTROPHES = re.compile(r"(?<![\w.,'\u2019])[1-9]\d{0,2}(?:['\u2019]\d{3})+(?![\d'\u2019])")
_LAKHS = re.compile(r"(?<![\d.,])[1-9]\d?(?:,\d{2})+,\d{3}(?![\d,])")
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])([1-9]\d{0,2}(?:(?:\.\d{3})+|(?: \d{3})+)),(\d{1,2})(?![\d.,]\d|\d)")


def clean(text: str) -> str:
    """Replace control and direction characters by spaces, and full-width characters by their ASCII forms."""
    return _INVISIBLE.sub(" ", text if text.isascii() else _ATTACHED.sub(r"\1*", text)).translate(_PLAIN)


def plain(text: str) -> str:
    """Return cleaned text without emphasis, code marks, tags of HTML and struck-out words."""
    text = clean(text)
    if "<" in text:
        text = _BREAK.sub("\n", _TAG.sub("", text))
    if "~~" in text:
        text = _STRUCK.sub(" ", text)
    if "\\" in text:
        text = _SIUNITX.sub(r"\1 ", _BOLD_SYMBOL.sub("", _COLOR.sub("", text)))
    text = text.replace("`", "")
    if "*" in text or "_" in text:
        text = _CLOSING.sub("", _OPENING.sub("", _LABEL.sub(r"\1", text)))
        text = _SINGLE.sub(r"\g<inside>", text)
    return text


def powers(text: str) -> str:
    """Write raised digits behind a number or a bracket as LaTeX does: `10\u207b\u00b3` becomes `10^{-3}`."""
    return _RAISED.sub(lambda match: f"^{{{match[0].translate(_RAISED_SIGNS)}}}", text)


def strip(text: str) -> str:
    """Remove spaces, marks, quotes around the whole, and one final dot, in whatever order they occur at the ends."""
    before = None
    while text != before:
        before = text
        text = text.strip(_AT_ENDS)
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        if len(text) > 1 and text[0] in QUOTES and text[-1] in QUOTES:
            text = text[1:-1]
        elif text.endswith((*"!?", ",", ";")) and len(text) > 1 and text[-2] in "*`_" + QUOTES:
            text = text[:-1]  # punctuation behind the marks is the sentence's, not the answer's
    return text


def join_thousands(text: str) -> str:
    r"""Remove what LaTeX, typography and code put between groups of three digits: `10,\!000`, `10\,000`, `10_000`."""
    if "\\" in text or "~" in text or "{" in text:
        text = _THOUSANDS[0].sub("", text)
        text = _THOUSANDS[1].sub(lambda match: re.sub(r"\\![ ]?", "", match[0]), text)
    return _UNDERSCORES.sub(lambda match: match[0].replace("_", ""), text) if "_" in text else text


def join_groups(text: str) -> str:
    """Write grouped numbers without groups: `10'000`, Indian `12,34,567`, and `1.234,50` with a decimal comma.

    A single comma or dot, which can be either, stays. Only for text that is read as one number: `1,23,456` may be
    three.
    """
    if "'" in text or "\u2019" in text:
        text = _APOSTROPHES.sub(lambda match: re.sub("['\u2019]", "", match[0]), text)
    if "," in text:
        text = _LAKHS.sub(lambda match: match[0].replace(",", ""), text)
        text = _DECIMAL_COMMA.sub(lambda match: f"{re.sub('[. ]', '', match[1])}.{match[2]}", text)
    return text
