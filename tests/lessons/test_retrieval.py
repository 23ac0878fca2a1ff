"""Lexical retrieval: the words that count, relevance by hand, and no foreign lessons."""

from __future__ import annotations

import math
import random

import pytest

from mel_lite.lessons.bank.retrieval import LEAST_MATCH, RULE_BOOST, LexicalRetrieval, words
from mel_lite.types import BankLesson


def lesson(id_: int, heuristic: str, question: str, score: float = 1.0) -> BankLesson:
    return BankLesson(id_, heuristic, question, score, 1, False, 0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 zap 7 dax 2?", ["zap", "dax"]),
        ("- If I see zap, then Zap is from.", ["see", "zap", "zap"]),
        ("What is 5 + 0 - 8?", ["add", "subtract"]),
        ("If signs are plus and minus, I must not add, but subtract.", ["sign", "add", "subtract", "must", "add",
                                                                       "subtract"]),
        ("Taking away 20 percent; take 5 away; multiplied, dividing", ["subtract", "percent", "take", "away",
                                                                       "multiply", "divide"]),
        ("-15, 2026-06-27 +0600 `<number>` and/or **bold** HH:MM", ["number", "bold", "hh", "mm"]),
        ("- 8 of them\n* a well-known step-by-step list", ["well", "known", "step", "step", "list"]),
        ("20% of the prices, less x^2 / 4 = y \u2212 1", ["percent", "price", "less", "x", "power", "divide", "equal",
                                                            "subtract"]),
        ("3 \u00d7 2 * (4 < 9)", ["multiply", "multiply", "less"]),
        ("The class passes glasses", ["class", "passe", "glasse"]),
        ("\u7ed3\u679c\u662f ok", ["\u7ed3", "\u679c", "\u662f", "ok"]),
        ("", []),
    ],
)  # fmt: skip
def test_the_words_of_a_text(text: str, found: list[str]) -> None:
    assert words(text) == tuple(found)


def test_relevance_is_the_share_of_the_questions_weight() -> None:
    lessons = [
        lesson(1, "- If I see zap, then zap is from.", "3 zap 7 dax 2 lor 1?"),
        lesson(2, "- Read slowly.", "3 dax 7 gud 2 wix 1?"),
    ]
    # Lucene's idf over two questions of three words: dax is in both, the others in one. Equal lengths and term counts
    # cancel out.
    rare, common = math.log(1 + 1.5 / 1.5), math.log(1 + 0.5 / 2.5)
    relevance = LexicalRetrieval().relevance
    assert relevance("8 zap 8?", lessons) == pytest.approx([20 * rare / (21 * rare + common), 0.0])
    assert relevance("zap 8 zap 8 zap?", lessons) == relevance("8 zap 8?", lessons), "a word counts once"
    assert relevance("8 lor 8 dax 9?", lessons) == pytest.approx(
        [(rare + common) / (21 * rare + common), common / (2 * rare + common)]
    )
    assert relevance("1 wix 8 dax 9 gud 1 bli 2?", lessons)[1] == pytest.approx(1.0)
    assert relevance("1 bli 2?", lessons) == [0.0, 0.0] and RULE_BOOST == 20


def test_matches_are_ranked_by_relevance_then_score_then_age() -> None:
    lessons = [
        lesson(4, "- If I see zap, then zap is from.", "3 zap 7 dax 2?"),
        lesson(5, "- If I see zap, then zap is add.", "3 zap 7 lor 2?", score=2.0),
        lesson(6, "- If I see zap, then zap is take.", "3 zap 7 wix 2?"),
        lesson(7, "- If I see gud, then gud is take.", "3 zap 7 gud 2?"),
    ]
    found = LexicalRetrieval()
    assert [each.id for each in found("5 zap 1?", lessons)] == [5, 4, 6]
    assert [each.id for each in found("5 wix 1 zap 3?", lessons)] == [6, 5, 4]
    assert found("5 bli 1?", lessons) == [] and found("5 + 1", lessons) == []


@pytest.mark.filterwarnings("error")
def test_texts_without_words_match_nothing() -> None:
    bare = [lesson(1, "- If so, then not.", "12?"), lesson(2, "- If so, then not so.", "")]
    assert LexicalRetrieval()("3 zap 4?", bare) == []
    mixed = [*bare, lesson(3, "- If I see zap, then zap is from.", "3 zap 4?")]
    assert [each.id for each in LexicalRetrieval()("3 zap 4?", mixed)] == [3]
    assert LexicalRetrieval()("12?", mixed) == [] and LexicalRetrieval()("3 zap 4?", []) == []


def test_the_index_follows_the_lessons() -> None:
    found = LexicalRetrieval()
    first = [lesson(1, "- If I see zap, then zap is from.", "3 zap 7?")]
    assert found("1 dax 2?", first) == []
    assert [each.id for each in found("1 dax 2?", [*first, lesson(2, "- If I see dax, add.", "2 dax 1?")])] == [2]
    assert found("1 dax 2?", first) == []
    assert found("1 dax 2?", [lesson(1, "- If I see dax, then dax is from.", "3 dax 7?")]), "another bank, the same id"
    changed = [lesson(1, "- If I see zap, then zap is from.", "3 zap 7?", score=-4.0)]
    assert found("1 zap 2?", changed) == changed, "a lesson of now, not of when the index was built"


def test_among_made_up_operators_rules_are_found_by_name_alone() -> None:
    rng = random.Random(3)
    operators = [a + b + c for a in "bdfgklmz" for b in "aeiou" for c in "pxz"][:60]
    lessons, about = [], []
    for id_ in range(300):
        asked = rng.sample(operators, 6)
        about.append(rng.choice(asked))
        text = "".join(f" {op} {rng.randint(0, 9)}" for op in asked)
        lessons.append(lesson(id_, f"- If I see {about[-1]}, then {about[-1]} is take.", f"3{text}?"))
    retrieval = LexicalRetrieval()
    for _ in range(40):
        asked = rng.sample(operators, 6)
        question = "4" + "".join(f" {op} {rng.randint(0, 9)}" for op in asked) + "?"
        want = {each.id for each, op in zip(lessons, about, strict=True) if op in asked}
        assert {each.id for each in retrieval(question, lessons)} == want and want
    assert LEAST_MATCH > 5 / (5 + RULE_BOOST), "five shared words without the rule's own are no match"
