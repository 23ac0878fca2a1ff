"""Find the lessons of a bank that apply to a question, by the words of the lesson and of the question it came from."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from mel_lite.errors import ConfigError
from mel_lite.imports import load_object
from mel_lite.text import did_you_mean
from mel_lite.types import BankLesson

Retrieval = Callable[[str, Sequence[BankLesson]], Sequence[BankLesson]]
"""(question, active lessons) -> the lessons that apply to the question, best first."""
RULE_BOOST = 20.0
"""Weight of a word of the question that the lesson's rules mention, relative to its other words."""
LEAST_MATCH = 1 / 3
"""Least relevance of a match. With fewer than 10 equally rare words in a question, those that the rules mention must be
there: sharing all the others is not enough."""
LEXICAL = "lexical"

_LETTER = r"[^\W\d_]"
_CJK = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"
_TOKEN = re.compile(
    rf"{_CJK}|{_LETTER}+(?:'{_LETTER}+)?|[=^%\u00d7\u00f7]|(?<=[\s\d)])(?:[-+\u2212](?=\s)|[*/<>](?=[\s\d(]))"
)
_BULLET = re.compile(r"(?m)^[ \t]*[-*+\u2022][ \t]+")
_SYMBOLS = {
    "+": "add", "-": "subtract", "\u2212": "subtract", "*": "multiply", "\u00d7": "multiply", "/": "divide",
    "\u00f7": "divide", "=": "equal", "<": "less", ">": "greater", "^": "power", "%": "percent",
}  # fmt: skip
_ARITHMETIC = re.compile(
    r"(?P<add>plus|add(?:s|ed|ing|ition)?)|(?P<subtract>minus|subtract\w*)|"
    r"(?P<multiply>multipl\w*)|(?P<divide>divi(?:d\w*|sion))|(?P<percent>percent\w*)"
)
_TAKE_AWAY = re.compile(r"\b(?:take|takes|taking|took|taken) away\b")


@lru_cache(maxsize=4096)  # a bank compares the same texts in every batch
def words(text: str) -> tuple[str, ...]:
    """Return the words that retrieval compares, in order: lower case, no plural s, no numbers, no English stop words.

    Mathematical symbols are words by their names, so that `-` in a question meets `minus` in a rule. Each Chinese,
    Japanese or Korean character is a word.
    """
    from bm25s.stopwords import STOPWORDS_EN_PLUS as stop_words

    folded = _TAKE_AWAY.sub("subtract", _BULLET.sub("", unicodedata.normalize("NFKC", text).casefold()))
    found = (_SYMBOLS.get(token, token) for token in _TOKEN.findall(folded))
    return tuple(_stem(word) for word in found if word not in stop_words)


def _stem(word: str) -> str:
    if named := _ARITHMETIC.fullmatch(word):
        return str(named.lastgroup)
    return word[:-1] if len(word) > 3 and word[-1] == "s" and word[-2] not in "su" else word


class LexicalRetrieval:
    """Rank lessons by BM25 over the questions they came from, where the words that their rules mention weigh more.

    With s(w) the BM25 score of word w in the lesson's question, times `RULE_BOOST` if the rules mention w:
    relevance(x) = sum of s(w) over the words of x / sum of s(w) over the words of the lesson's question, in [0, 1].

    BM25 (Robertson and Zaragoza 2009) is `bm25s`, in Lucene's form, whose idf is never negative.
    """

    def __init__(self) -> None:
        self._texts: list[tuple[str, str]] = []
        self._index: Any = None
        self._rules: list[frozenset[str]] = []
        self._whole: list[float] = []

    def __call__(self, question: str, lessons: Sequence[BankLesson]) -> list[BankLesson]:
        """Return the lessons of relevance `LEAST_MATCH` and above; ties go to the higher score, then the older one."""
        relevance = self.relevance(question, lessons)
        ranked = [
            (-round(value, 6), -lesson.score, order, lesson)
            for order, (value, lesson) in enumerate(zip(relevance, lessons, strict=True))
            if value >= LEAST_MATCH
        ]
        return [lesson for *_, lesson in sorted(ranked, key=lambda each: each[:3])]

    def relevance(self, question: str, lessons: Sequence[BankLesson]) -> list[float]:
        """Return the relevance of every lesson to the question, each in [0, 1]."""
        texts = [(lesson.heuristic, lesson.question_text) for lesson in lessons]
        if texts != self._texts:
            self._build(texts)
            self._texts = texts
        if self._index is None:
            return [0.0] * len(lessons)
        sums = [0.0] * len(lessons)
        for word in sorted(set(words(question))):
            for i, score in enumerate(self._index.get_scores([word]).tolist()):
                if score:
                    sums[i] += score * (RULE_BOOST if word in self._rules[i] else 1.0)
        return [part / whole if whole else 0.0 for part, whole in zip(sums, self._whole, strict=True)]

    def _build(self, texts: Sequence[tuple[str, str]]) -> None:
        import bm25s

        # Each word once: a question that repeats one is not more about it.
        questions = [sorted(set(words(question))) for _, question in texts]
        self._rules = [frozenset(words(heuristic)) for heuristic, _ in texts]
        self._index = None
        if not any(questions):
            return
        self._index = bm25s.BM25(method="lucene")
        self._index.index(questions, show_progress=False)
        self._whole = []
        for i, found in enumerate(questions):
            mentioned = [word for word in found if word in self._rules[i]]
            scores = [float(self._index.get_scores(part)[i]) if part else 0.0 for part in (found, mentioned)]
            self._whole.append(scores[0] + (RULE_BOOST - 1) * scores[1])


def get_retrieval(name: str) -> Retrieval:
    """Return the retrieval called `name`: `lexical`, or the function at a dotted path.

    Raises: ConfigError for an unknown name, a path that does not import, or an object that cannot be called.
    """
    if name == LEXICAL:
        return LexicalRetrieval()
    if ":" not in name and "." not in name:
        raise ConfigError(
            f"bank_retrieval={name!r} is unknown.{did_you_mean(name, [LEXICAL])} Set bank_retrieval to {LEXICAL!r}, or "
            "to a dotted path such as 'my_module:my_function'."
        )
    found = load_object(name, field="bank_retrieval", error=ConfigError)
    if not callable(found):
        raise ConfigError(
            f"bank_retrieval={name!r} is a {type(found).__name__}. Name a function (question, lessons) that returns "
            "the lessons that apply, best first."
        )
    return found


__all__ = ["LEAST_MATCH", "LEXICAL", "LexicalRetrieval", "Retrieval", "get_retrieval", "words"]
