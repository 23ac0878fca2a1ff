"""The leak guard against a labeled corpus, each rule by itself, redaction, and hostile text."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_limit import cpu_limit
from leak_cases import CLEAN, CORPUS, check, check_case
from mel_lite.errors import ConfigError
from mel_lite.lessons.answer_mentions import fold, numbers_in, read_gold
from mel_lite.lessons.leak_guard import REDACTED, check_leak
from mel_lite.types import LeakReport, MetaExperience


def test_recall_and_false_positives_on_the_corpus() -> None:
    wrong = {True: [], False: []}
    for case in CORPUS:
        if check_case(case).leaks != case["leak"]:
            wrong[case["leak"]].append(f"{case['answer']!r} in {case['text']!r}")
    leaks = sum(case["leak"] for case in CORPUS)
    assert leaks >= 60 and len(CORPUS) - leaks >= 60
    assert len(wrong[True]) <= 0.01 * leaks, f"missed: {wrong[True]}"
    assert len(wrong[False]) <= 0.03 * (len(CORPUS) - leaks), f"false alarms: {wrong[False]}"


def test_redaction_cleans_every_leak_of_the_corpus_and_keeps_the_rest() -> None:
    rest = "\nThe other habits of this solver are sound."
    for case in (case for case in CORPUS if case["leak"]):
        report = check_case(case | {"text": case["text"] + rest}, policy="redact")
        if not report.leaks:
            continue  # counted by the test of recall
        assert report.redacted is not None, case
        text = getattr(report.redacted, case["part"])
        assert REDACTED in text and text.endswith(rest)
        assert check_case(case | {"text": text}).reasons == ()
        for part in CLEAN.keys() - {case["part"]}:
            assert getattr(report.redacted, part) == CLEAN[part]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("The right total of 474 needs both products.", "The right total of [...] needs both products."),
        ("Its final answer is 400, which is wrong.", "Its final answer is [...], which is wrong."),
        ("So \\boxed{474} ends a long solution.", "So [...] ends a long solution."),
    ],
)
def test_only_the_offending_span_goes(text: str, redacted: str) -> None:
    report = check(text, policy="redact")
    assert report.redacted is not None and report.redacted.critique == redacted


def test_a_part_that_is_only_the_leak_cannot_be_redacted():
    report = check("\\boxed{474}", policy="redact")
    assert report.leaks and report.redacted is None


def test_the_reason_names_rule_part_and_span() -> None:
    assert check("So it is 474 then.", part="heuristic").reasons == ("the answer as a number: the heuristic has '474'",)
    assert check("see \\boxed{12}", answer=None).reasons == ("final-answer markup: the critique has '\\\\boxed{12}'",)
    two = check("First 474, then four hundred seventy-four.")
    assert len(two.reasons) == 2 and "'four hundred seventy-four'" in two.reasons[1]


def test_policies() -> None:
    leak = "So it is 474 then."
    assert check(leak, policy="off") == LeakReport()
    assert check(leak, policy="reject").redacted is None
    assert check("Nothing here leaks.", policy="redact") == LeakReport()
    with pytest.raises(ConfigError, match="leak_policy='drop' is not one of reject, redact, off"):
        check(leak, policy="drop")


def test_what_the_analysis_says_around_its_parts_counts_too() -> None:
    raw = "## Bifurcation\nA step.\n## Heuristics\nIf unsure, read.\n\nFinal Answer: 474"
    rejected = check("A rushed reading.", raw=raw)
    assert rejected.reasons == ("final-answer markup: the analysis around its parts has '474'",)
    assert check("A rushed reading.", raw=raw, policy="redact").redacted == MetaExperience(
        **CLEAN | {"critique": "A rushed reading."}
    )


def test_copied_spans_have_the_stated_length() -> None:
    right = "alpha beta gamma delta epsilon zeta eta theta iota kappa lamda mu nu xi omikron"
    words = right.split()
    assert not check("He wrote " + " ".join(words[:8]) + ".", right=right).leaks
    assert check("He wrote " + " ".join(words[:12]) + ".", right=right).leaks
    report = check("He wrote ALPHA  beta,\n" + " ".join(words[2:13]) + " and left.", right=right, policy="redact")
    assert report.redacted is not None and report.redacted.critique == "He wrote [...] and left."
    formula = "x=\\frac{a+b}{c-d}+\\frac{e+f}{g-h}-\\frac{p+q}{r-s}*\\frac{u+v}{w-y}"
    assert check(f"Then {formula}", right=f"We have {formula}.").leaks


def test_a_quotation_of_the_question_is_no_copy() -> None:
    question = "A farmer has a field that is forty metres long and thirty metres wide, and walks around it twice."
    right = question + " So I add the sides."
    assert not check("It read: " + question, right=right, question=question).leaks
    assert check("It read: " + question, right=right).leaks


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,234.50 and 1{,}234", ["2469/2", "1234"]),
        ("-3, 5-3 and minus four", ["-3", "5", "3", "-4"]),
        ("\\frac{3}{4}, \\dfrac12, 6/8 and \u00be", ["3/4", "1/2", "3/4", "3/4"]),
        ("two hundred and five, twenty-one thousand", ["205", "21000"]),
        ("\u0661\u0662 and \uff13\uff14 and \u221256", ["12", "34", "-56"]),
        (".5 of 2.5e3 at 5/0", ["1/2", "2500"]),
    ],
)
def test_numbers_are_read_however_they_are_written(text: str, values: list[str]) -> None:
    assert [str(found.number.value) for found in numbers_in(fold(text))] == values


@given(st.integers(0, 999_999))
def test_every_spelling_of_an_integer_is_found(number: int) -> None:
    for written in (str(number), f"{number:,}", f"{number}.0", f"{number:,}".replace(",", "{,}")):
        assert [found.number.value for found in numbers_in(written)] == [number], written


@given(st.text(max_size=200))
def test_folding_keeps_every_position(text: str) -> None:
    assert len(fold(text)) == len(text)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=120), st.text(max_size=30), st.text(max_size=60))
def test_any_text_gets_a_report_and_a_redaction_that_is_clean(text: str, answer: str, right: str) -> None:
    report = check(text + " and more words here", answer=answer, right=right, policy="redact")
    if report.redacted is not None:
        again = check_leak(report.redacted, answer=answer, right_text=right, prompt_text="How many?", policy="reject")
        assert again.reasons == ()


@pytest.mark.parametrize(
    ("answer", "question", "clean", "leak"),
    [
        ("12", "", "In step 12 nothing new happens.", "In the end 12 remain."),
        ("12", "", "On the 12th line it slipped.", "On line two it wrote 12."),
        ("12", "", "12. Look again.", "12 was the number."),
        ("10", "", "Written in base 10.", "Written as 10."),
        ("3", "", "There are 3 steps here.", "There are 3 apples here."),
        ("3", "", "It is 3 + 4 in sum.", "It is 3 in sum."),
        ("3", "", "The wrong one is >= 3.", "The wrong one is = 3."),
        ("0", "", "If the divisor is 0, stop.", "The remainder then is 0."),
        ("0", "", "It made zero checks.", "It made zero."),
        ("2", "", "There are two solutions.", "Then there are two."),
        ("60", "At 60 miles per hour?", "The speed of 60 was misread.", "The answer of 60 was misread."),
        ("60", "If v = 60, how far?", "It set v = 60 at first.", "It set d = 60 at last."),
        ("67", "What is 12 + 55?", "It read 12 + 55 wrongly.", "It read 13 + 54 wrongly."),
        ("3/4", "Simplify 6/8.", "The given 6/8 shrinks.", "It shrinks to 3/4."),
        ("B", "", "Option B was skipped.", "Option (B) is correct."),
        ("even", "", "It tried even numbers.", "The answer is even."),
        ("Alice", "Alice or Bob?", "It mixed up Alice and Bob.", "It should be Alice."),
        (">", "", "It wrote 3 > 2 once.", "The answer is >."),
        ("Paris", "Which city?", "It named a river.", "It named no Paris."),
    ],
)
def test_a_stated_answer_leaks_and_a_mentioned_value_does_not(answer, question, clean, leak):
    assert check(clean, answer=answer, question=question).reasons == ()
    assert check(leak, answer=answer, question=question).leaks


def test_an_empty_answer_leaves_the_other_rules() -> None:
    assert read_gold(" $ ", "") is None
    assert not check("It is 474.", answer="").leaks
    assert check("The answer is 474.", answer="").leaks


HOSTILE = {
    "towers": "$9^{9^{9^{9}}}$ = $2^{2^{2^{2^{2}}}}$ " * 40,
    "factorials": "= 20000000! = $99999999!$ " * 40,
    "powers of sums": "$(x+y+z+w)^{400}$ = $(a+b+c+d)^64$ " * 40,
    "nested roots": "$\\sqrt{2+\\sqrt{3+\\sqrt{5+\\sqrt{7}}}}$ " * 40,
    "brackets": "(" * 40_000,
    "boxes": "\\boxed{" * 6_000,
    "digits": "7" * 40_000,
    "operators": "1+" * 20_000,
    "spaces": "the answer is" + " " * 40_000 + "x",
    "stars": "answer: " + "*" * 40_000,
    "words": "one hundred " * 4_000,
    "equals": "= " * 20_000,
    "answers": "the answer of the result of the total of " * 1_000,
    "dollars": "$" * 40_000,
    "findings": "= 7 = B = $x^2+1$ = $\\sqrt{2}$ \\boxed{7} " * 900,
    "commas": "1,111" + ",111" * 8_000 + ",11",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("answer", ["7", "x^2+1", "\\sqrt{2}", "B"])
def test_hostile_text_takes_no_quadratic_time(name: str, answer: str) -> None:
    check("warm up $1+1$", answer=answer)
    with cpu_limit(4):
        report = check(HOSTILE[name], answer=answer, right=HOSTILE[name][:2_000])
    assert isinstance(report.reasons, tuple) and len(report.reasons) < 40_000


def test_the_guard_works_off_the_main_thread() -> None:
    reports: list[LeakReport] = []
    thread = threading.Thread(target=lambda: reports.append(check("It is $\\sqrt{50}$ long.", answer="5\\sqrt{2}")))
    thread.start()
    thread.join()
    assert reports[0].reasons == ("an expression equal to the answer: the critique has '\\\\sqrt{50}'",)
