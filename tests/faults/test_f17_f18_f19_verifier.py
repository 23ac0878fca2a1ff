"""F17, F18, F19: hostile answers, dying workers, swapped arguments; and the measured figures of the verifier.

tests/verify/test_pool.py and tests/verify/test_verifiers.py test each attack on a worker alone (hang, C loop, fork,
memory, segfault, garbage on the pipe, threads) and the order of arguments.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from math_verify import parse, verify

from labeled_answers import HOSTILE, LABELED
from mel_lite.types import Verdict
from mel_lite.verify.pool import VerifyPool
from mel_lite.verify.verifiers import get_verifier
from reported_answers import columns_of

SLOW_RULE = """
import os, time
def rule(completion, answer):
    if completion == "hang":
        time.sleep(600)
    if completion == "spin":
        sum(range(10**13))
    if completion == "die":
        os.kill(os.getpid(), 11)
    return completion == answer
"""


KNOWN_MISSES = {
    ("exact", "Answer: *"),  # marks at the ends of an answer are Markdown
    ("numeric", "7 = 3 + 4"),  # the last number of an unmarked answer counts; with `Answer:`, 7 is read
    ("multiple-choice", "C. 5\n\nA. is 3, B. is 4."),  # the last line names two other options
    ("multiple-choice", "I'd choose a."),  # a small letter can be an article, and `Or b.` might follow
    ("multiple-choice", "A is true but B is the better answer."),  # two options are asserted
}
"""Right answers that are judged wrong: a rule that reads them would read a wrong one as right."""


def test_agreement_with_the_labeled_answers(record_property: Any) -> None:
    assert len(LABELED) >= 1_500 and len(set(LABELED)) == len(LABELED)
    wrong = []
    for verifier, completion, answer, verdict in LABELED:
        if verifier == "reasoning-gym":
            pytest.importorskip("reasoning_gym")
        got = get_verifier(verifier)(completion, answer, **columns_of(verifier, answer))
        if got != verdict:
            wrong.append((verifier, completion, answer, verdict, str(got)))
    record_property("labeled_answers", len(LABELED))
    record_property("agreement", 1 - len(wrong) / len(LABELED))
    assert {case[:2] for case in wrong} == KNOWN_MISSES, wrong
    assert all(case[-1] == "wrong" for case in wrong), "no wrong answer may be called right"


def test_agreement_of_math_verify_alone(record_property: Any) -> None:
    """The figures of docs/tasks.md: our verifiers and bare math-verify on the same answers to questions of numbers."""
    cases = [case for case in LABELED if case[0] in ("math", "numeric") and case[3] != "abstain"]
    ours = sum(get_verifier(verifier)(text, answer) == verdict for verifier, text, answer, verdict in cases)
    alone = sum(_math_verify_alone(text, answer) == (verdict == "right") for _, text, answer, verdict in cases)
    record_property("math_verify_cases", len(cases))
    record_property("math_verify_agreement", alone / len(cases))
    page = " ".join((Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8").split())
    assert f"On {len(cases)} labeled answers" in page
    assert (
        f"agree with the labels on {ours / len(cases):.1%} and math-verify alone on {alone / len(cases):.1%}." in page
    )


def _math_verify_alone(completion: str, answer: str) -> bool:
    """Return what math-verify's README does: parse both as they are, and compare."""
    gold, found = (parse(text, parsing_timeout=None) for text in (answer, completion))
    return bool(verify(gold, found, timeout_seconds=None))


@pytest.mark.slow
def test_no_attack_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(HOSTILE) >= 50
    with VerifyPool("math", deadline_s=1.0) as pool:
        verdicts = pool.verify([(text, answer, {}) for _, text, answer in HOSTILE])
        # For one of the 18 attacks of answer_pairs, any verdict but `right` is correct, not only `wrong`.
    accepted = [name for (name, _, _), verdict in zip(HOSTILE, verdicts, strict=True) if verdict is Verdict.RIGHT]
    record_property("attacks", len(HOSTILE))
    record_property("attacks_accepted", len(accepted))
    assert accepted == []
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.slow
def test_thirty_hostile_answers_of_forty_cost_only_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    (tmp_path / "rule_here.py").write_text(SLOW_RULE)
    monkeypatch.chdir(tmp_path)
    before = len(psutil.Process().children(recursive=True))
    items = [(f"{i}", f"{i}", {}) if i % 4 == 0 else (("hang", "spin", "die")[i % 3], "x", {}) for i in range(40)]
    with VerifyPool("rule_here:rule", deadline_s=2.0) as pool:
        start_s = time.monotonic()
        verdicts = pool.verify(items)
        record_property("hostile_batch_s", time.monotonic() - start_s)
    record_property("hostile_batch_right", sum(v is Verdict.RIGHT for v in verdicts))
    assert [str(v) for v in verdicts] == ["right" if i % 4 == 0 else "abstain" for i in range(40)]
    assert len(psutil.Process().children(recursive=True)) == before
