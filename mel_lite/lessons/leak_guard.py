"""Leak guard: detect meta-experiences that state the answer of their problem.

A replay that copies the answer from its notes validates nothing, and training on such notes teaches the model to guess.
Every part is searched for the answer as text, as a number and as an equivalent expression, for final-answer markup with
a value in it, and for long spans copied from the right solution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from math import prod
from typing import Any

from mel_lite.errors import check_choice
from mel_lite.lessons.answer_mentions import Gold, fold, is_label, is_stated, numbers_in, read_gold, squash
from mel_lite.text import shorten
from mel_lite.types import LeakPolicy, LeakReport, MetaExperience

REDACTED = "[...]"
COPIED_WORDS = 12
"""Length in words from which a span that occurs in the right solution counts as copied."""
COPIED_CHARS = 50
"""The same length in characters without white space (about 60 with it)."""
_QUOTED_WORDS = 6
"""Length in words from which a span that occurs in the question counts as a quotation of the question."""
_MIN_PART_WORDS = 3
_REDACT_ROUNDS = 3
_MAX_FINDINGS = 200
_MAX_EXPRESSIONS = 16
_MAX_EXPRESSION_CHARS = 48


@dataclass(frozen=True, slots=True)
class _Finding:
    rule: str
    start: int
    end: int


def check_leak(
    experience: MetaExperience,
    *,
    answer: str | None,
    right_text: str,
    prompt_text: str,
    policy: str,
    raw_text: str | None = None,
) -> LeakReport:
    """Search M for the answer. With the policy `redact`, also remove the leaking spans.

    Args: `raw_text`, the analysis as sampled: leaks outside its parsed parts also count, since it may be trained on.
    Returns: `reasons`, one sentence per finding; `redacted`, M without the leaking spans, or None if it still leaks, a
        part has no words left, or the policy is `reject`. The policy `off` finds nothing.
    Raises: ConfigError for an unknown policy.
    """
    check_choice("leak_policy", policy, LeakPolicy)
    if policy == LeakPolicy.OFF:
        return LeakReport()
    guard = _Guard(answer, right_text, prompt_text)
    parts = {name: getattr(experience, name) for name in ("bifurcation", "critique", "heuristic")}
    reasons = [
        _sentence(finding, f"the {name}", text) for name, text in parts.items() for finding in guard.findings(text)
    ]
    if not reasons and raw_text is not None:
        reasons = [_sentence(found, "the analysis around its parts", raw_text) for found in guard.findings(raw_text)]
    if not reasons or policy == LeakPolicy.REJECT:
        return LeakReport(tuple(reasons))
    redacted = {name: guard.redact(text) for name, text in parts.items()}
    if any(text is None for text in redacted.values()):
        return LeakReport(tuple(reasons))
    return LeakReport(tuple(reasons), MetaExperience(**{name: text or "" for name, text in redacted.items()}))


def _sentence(finding: _Finding, where: str, text: str) -> str:
    span = " ".join(text[finding.start : finding.end].split())
    return f"{finding.rule}: {where} has {shorten(span)!r}"


class _Guard:
    """Leak rules for one problem."""

    def __init__(self, answer: str | None, right_text: str, question: str) -> None:
        self._question = fold(question)
        self._question_numbers = {number.form for number in numbers_in(self._question)}
        self._gold = read_gold(answer, self._question) if answer else None
        sources = [right_text]
        if answer and self._gold and self._gold.kind == "text" and self._gold.pattern is None:
            sources.append(answer)  # too long to search for as a whole
        self._copies = _Copies([fold(source) for source in sources], self._question)

    def findings(self, text: str) -> list[_Finding]:
        """Return the leaks in `text` by position. Of overlapping findings, that of the first rule is kept."""
        folded = fold(text)
        found: list[_Finding] = []
        for rule in (self._markup, self._answer, self._expressions, self._copied):
            for new in islice(rule(folded), _MAX_FINDINGS):
                if not any(new.start < old.end and old.start < new.end for old in found):
                    found.append(new)
        return sorted(found, key=lambda finding: finding.start)

    def redact(self, text: str) -> str | None:
        """Replace leaks in `text` by `[...]`. Returns None when leaks or too few words remain."""
        for _ in range(_REDACT_ROUNDS):
            found = self.findings(text)
            if not found:
                break
            for finding in reversed(found):
                text = text[: finding.start] + REDACTED + text[finding.end :]
        if self.findings(text) or len(re.findall(r"\w+", text)) < _MIN_PART_WORDS:
            return None
        return text

    def _markup(self, text: str) -> Iterator[_Finding]:
        for start, end, content in _marked(text):
            if self._is_value(content):
                yield _Finding("final-answer markup", start, end)

    def _is_value(self, content: str) -> bool:
        """Return True for text that can be an answer, unlike the placeholder in `\\boxed{answer}`."""
        content = content.strip(" \t$*`\"'()").rstrip(".,;:!?")
        if self._gold is not None and squash(content) == squash(self._gold.text):
            return True
        return bool(
            re.search(r"\d", content) or re.fullmatch(r"[A-Z]", content) or _LATEX_VALUE.search(content)
        ) or any((number.start, number.end) == (0, len(content)) for number in numbers_in(content))

    def _answer(self, text: str) -> Iterator[_Finding]:
        gold = self._gold
        if gold is None:
            return
        if gold.number is not None:
            yield from self._numbers(text, gold)
        elif gold.pattern is not None:
            for match in gold.pattern.finditer(text):
                if not gold.needs_context or is_stated(text, *match.span(), gold.kind, self._question):
                    yield _Finding("the answer", *match.span())

    def _numbers(self, text: str, gold: Gold) -> Iterator[_Finding]:
        assert gold.number is not None
        for mention in numbers_in(text):
            if not mention.means(gold.number) or is_label(text, mention.start, mention.end):
                continue
            if mention.form == "100%" and not gold.number.percent:
                continue  # "be 100% sure"
            kind = "spelled" if mention.spelled else "digits"
            if mention.number.value in (0, 1):
                kind = "spelled unit" if mention.spelled else "unit"
            bare_counts = not gold.needs_context and mention.form not in self._question_numbers
            if bare_counts or is_stated(text, mention.start, mention.end, kind, self._question):
                yield _Finding("the answer as a number", mention.start, mention.end)

    def _expressions(self, text: str) -> Iterator[_Finding]:
        gold = self._gold
        if gold is None:
            return
        number = gold.number
        formula = gold.text if number is None else str(number.value / 100 if number.percent else number.value)
        formula = _latex(formula)
        if not _is_safe(formula):
            return
        question = squash(_latex(self._question))
        for start, end in islice(_expressions(text), _MAX_EXPRESSIONS):
            expression = _latex(text[start:end])
            if gold.number is not None and re.fullmatch(r"[\d.,]+", expression):
                continue  # a number, which the rule for numbers has allowed
            if not _is_safe(expression) or squash(expression) in question:
                continue
            stated = not gold.needs_context or is_stated(text, start, end, "text", self._question)
            if stated and _equivalent(formula, expression):
                yield _Finding("an expression equal to the answer", start, end)

    def _copied(self, text: str) -> Iterator[_Finding]:
        for start, end in self._copies.spans(text):
            yield _Finding("copied from the right solution", start, end)


# ---- final-answer markup ---------------------------------------------------------------------------------------------

_LATEX_VALUE = re.compile(r"\\(?:[dt]?frac|sqrt|pi|infty)\b|^[a-z]$")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{", re.I)
_TAG = re.compile(r"<answer>([^<]{0,200})(?:</answer>|$)", re.I)
_HASHES = re.compile(r"^[ \t]*####[ \t]*([-+$\\(]*[\d.\\][^\s]{0,60})[ \t.]*$", re.M)
_PHRASE = re.compile(
    r"\banswers?(?:\s+(?:here|to (?:this|the) (?:question|problem)))?\W{0,3}?\s*(?::|=|\b(?:is|was|equals?|"
    r"(?:should|must|will|would) be|comes? (?:out )?(?:to|at)|of)\b)\s*(?:(?:exactly|simply|just|therefore|thus|"
    r"clearly|option|choice|equal to)\s+|[:*\"'`(\s])*",
    re.I,
)
_VALUE = re.compile(r"(?:\$?-?\d[\d,./]*|[-$\\(]+[\d\\a-z{}+*/^.,() -]{1,60}|[A-Z](?=[)\s.,;:!?*\"']|$))(?<![.,])")
_NOT_A_VALUE = re.compile(
    r"[\s-]?(?:digits?|decimals?|steps?|places?|parts?|lines?|sentences?|words?|significant|more|less|or more|times)\b"
)


def _marked(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and content of final-answer markup. For a phrase like "the answer is", only of its value."""
    for match in _BOX.finditer(text):
        depth = 1
        for end in range(match.end(), min(len(text), match.end() + 200)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                yield match.start(), end + 1, text[match.end() : end]
                break
    for pattern in (_TAG, _HASHES):
        for match in pattern.finditer(text):
            yield match.start(), match.end(), match[1]
    for match in _PHRASE.finditer(text):
        spelled = next(
            (n for n in numbers_in(text[match.end() : match.end() + 40]) if n.start == 0 and n.spelled), None
        )
        value = _VALUE.match(text, match.end())
        end = match.end() + spelled.end if spelled else value.end() if value else match.end()
        word = text[match.end() : end]
        is_pronoun = word.lower() == "one" or (word in ("A", "I") and re.match(r"\s+[a-z]", text[end : end + 3]))
        if word and not is_pronoun and not _NOT_A_VALUE.match(text, end):
            yield match.end(), end, word


# ---- equivalent expressions ------------------------------------------------------------------------------------------

_EXPRESSION = re.compile(
    r"\$([^$\n]{1,60})\$|\\\((.{1,60}?)\\\)|\\\[(.{1,60}?)\\\]|"
    r"(?<![\w.$\\])((?:[(\d\u221a-]|\\?sqrt\b|\\[dt]?frac\b)(?:[\d \t().+*/^{}\u00d7\u00b7\u00f7\u221a\u03c0-]|"
    r"\\?(?:sqrt|times|cdot|div|pi)(?![A-Za-z])|\\[dt]?frac(?![A-Za-z])){1,45})"
)
_COMMANDS = frozenset("frac dfrac tfrac sqrt pi cdot times div left right circ".split())
_SIGNS = "0123456789 \t\\{}()+-*/^.,|\u00d7\u00b7\u00f7\u221a\u03c0"
_POWER = re.compile(r"\^\s?(?:\{\s?-?(\d{1,2})\s?\}|-?(\d{1,2}))(?!\s?[\w^/])")
_OPERATOR_NAMES = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/"})


def _expressions(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of formulas and of sums with more than one term; of an equation, of each side."""
    for match in _EXPRESSION.finditer(text):
        start, end = match.span(match.lastindex or 0)
        at = start
        for side in text[start:end].split("="):
            content = side.lstrip(" \n.,").rstrip(" \n.,-+(")
            while content.endswith((")", " ")) and content.count(")") > content.count("("):
                content = content[:-1].rstrip(" .,")
            if content and re.search(r"\d{3}|[+*/^\\\u00d7\u00b7\u00f7\u221a\u03c0]|\d\s*-|pi|[A-Za-z]", content):
                first = at + side.index(content)
                yield first, first + len(content)
            at += len(side) + 1


def _latex(expression: str) -> str:
    """Rewrite `expression` with one sign per operator, and roots in LaTeX."""
    text = re.sub(r"\\(?:times|cdot)\b", "*", re.sub(r"\\div\b", "/", expression)).translate(_OPERATOR_NAMES)
    text = re.sub(r"(?:\u221a|(?<!\\)\bsqrt)\s?(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}", text)
    return text.replace("\u03c0", "\\pi ")


def _is_safe(expression: str) -> bool:
    """Return True for an expression that a computer algebra system evaluates immediately.

    It has no factorials, power towers, large powers or long numbers. Powers of sums are below 7, and letters are
    single variables.
    """
    if not 0 < len(expression) <= _MAX_EXPRESSION_CHARS or not re.fullmatch(
        r"[\w\s\\{}()+\-*/^.,|\u00d7\u00b7\u00f7\u221a]+", expression
    ):
        return False
    if "**" in expression or re.search(r"\d{13}", expression):
        return False
    if any(command not in _COMMANDS for command in re.findall(r"\\([A-Za-z]+)", expression)):
        return False
    letters = re.sub(r"\\[A-Za-z]+|\bpi\b", " ", expression)
    if re.search(r"[A-Za-z]{2}|_", letters):
        return False
    powers = _POWER.findall(expression)
    if len(powers) != expression.count("^"):
        return False
    return prod(int(power) for pair in powers for power in pair if power) <= (6 if letters.strip(_SIGNS) else 99)


@lru_cache(maxsize=1024)
def _equivalent(gold: str, expression: str) -> bool:
    """Return True if math-verify finds both equal.

    Both are safe expressions, so math-verify's timeouts, which work only in the main thread, are off.
    """
    try:
        return bool(_math_verify().verify(_parsed(gold), _parsed(expression), timeout_seconds=None))
    except Exception:  # an incomplete formula may raise anything and is no evidence of a leak
        return False


@lru_cache(maxsize=1024)
def _parsed(expression: str) -> Any:
    return _math_verify().parse(f"${expression}$", parsing_timeout=None)


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import math_verify
    from math_verify import grader, parser

    parser.TIMEOUT_WARNING_SHOWN = grader.TIMEOUT_WARNING_SHOWN = True  # the inputs are bounded instead
    return math_verify


# ---- copied spans ----------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")


class _Copies:
    """Finds long spans of the sources in a text, ignoring white space and case, except for spans of the question."""

    def __init__(self, sources: list[str], question: str) -> None:
        self._windows: set[tuple[str, ...]] = set()
        self._chars: set[str] = set()
        for source in sources:
            tokens = [match[0].lower() for match in _TOKEN.finditer(source)]
            words = [token for token in tokens if token.isalnum()]
            self._windows.update(zip(*(words[i:] for i in range(COPIED_WORDS)), strict=False))
            joined = "".join(tokens)
            self._chars.update(joined[i : i + COPIED_CHARS] for i in range(len(joined) - COPIED_CHARS + 1))
        words = [match[0].lower() for match in _TOKEN.finditer(question) if match[0].isalnum()]
        self._quoted = set(zip(*(words[i:] for i in range(_QUOTED_WORDS)), strict=False))

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield start and end of each maximal copied span, in order."""
        matches = list(_TOKEN.finditer(text))
        for segment in self._unquoted(matches):
            copied = self._copied(segment)
            start = 0
            while start < len(segment):
                end = start
                while end < len(segment) and copied[end]:
                    end += 1
                if end > start:
                    yield segment[start].start(), segment[end - 1].end()
                start = end + 1

    def _unquoted(self, matches: list[re.Match[str]]) -> Iterator[list[re.Match[str]]]:
        """Yield the runs of tokens between quotations of the question."""
        words = [(i, match[0].lower()) for i, match in enumerate(matches) if match[0].isalnum()]
        quoted = bytearray(len(matches))
        for window in zip(*(words[i:] for i in range(_QUOTED_WORDS)), strict=False):
            if tuple(word for _, word in window) in self._quoted:
                first, last = window[0][0], window[-1][0]
                quoted[first : last + 1] = b"\1" * (last + 1 - first)
        run: list[re.Match[str]] = []
        for is_quoted, match in zip(quoted, matches, strict=True):
            if not is_quoted:
                run.append(match)
            elif run:
                yield run
                run = []
        yield run

    def _copied(self, segment: list[re.Match[str]]) -> bytearray:
        """Return 1 for each token of a run that is in a copied window of words or characters, else 0."""
        copied = bytearray(len(segment))
        words = [(i, match[0].lower()) for i, match in enumerate(segment) if match[0].isalnum()]
        for window in zip(*(words[i:] for i in range(COPIED_WORDS)), strict=False):
            first, last = window[0][0], window[-1][0]
            # Twelve single letters of a formula do not count as twelve words.
            if (
                tuple(word for _, word in window) in self._windows
                and sum(len(word) for _, word in window) >= 2 * COPIED_WORDS
            ):
                copied[first : last + 1] = b"\1" * (last + 1 - first)
        lowered = [match[0].lower() for match in segment]
        ends = list(accumulate(map(len, lowered)))
        joined, last = "".join(lowered), 0
        for first in range(len(segment)):
            start = ends[first - 1] if first else 0
            if joined[start : start + COPIED_CHARS] in self._chars:
                last = max(last, first)
                while ends[last] < start + COPIED_CHARS:
                    last += 1
                copied[first : last + 1] = b"\1" * (last + 1 - first)
        return copied


__all__ = ["REDACTED", "check_leak"]
