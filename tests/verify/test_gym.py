"""Reasoning-gym answers are scored by the rules of their task, and never evaluated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mel_lite.errors import VerifierError
from mel_lite.types import Verdict
from mel_lite.verify import gym
from mel_lite.verify.verifiers import get_verifier


def gym_entry(task: str, answer: str, **metadata: object) -> str:
    return json.dumps({"question": "?", "answer": answer, "metadata": {"source_dataset": task, **metadata}})


def test_reasoning_gym_uses_the_scorer_of_the_task() -> None:
    pytest.importorskip("reasoning_gym")
    verifier = get_verifier("reasoning-gym")
    assert verifier("<answer>3</answer>", "3", gym_entry=gym_entry("gcd", "3")) is Verdict.RIGHT
    assert verifier("It is 3", "3", gym_entry=gym_entry("gcd", "3")) is Verdict.WRONG  # partial credit
    entry = gym_entry("countdown", "4*(3+2)", numbers=[2, 3, 4], target=20)
    assert verifier("Answer: (2+3)*4", "4*(3+2)", gym_entry=entry) is Verdict.RIGHT
    assert verifier("Answer: 2+3*4", "4*(3+2)", gym_entry=entry) is Verdict.WRONG


@pytest.mark.parametrize("task", sorted(gym._EVALUATED | gym._PARSED))
def test_reasoning_gym_never_evaluates_the_answer(task: str, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    canary = tmp_path / "canary"
    entry = gym_entry(task, "x", numbers=[1], target=1, valid_answers=["x"], variable="x", integrand="1")
    for attack in (
        f"open({str(canary)!r}, 'w')",
        f"__import__('pathlib').Path({str(canary)!r}).touch()",
        "().__class__",
    ):
        assert gym.score(attack, entry) == 0.0
    assert not canary.exists()
    if task in gym._EVALUATED:
        assert gym.score("x", entry) == 1.0


def test_reasoning_gym_errors_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerifierError, match="column 'gym_entry' = 'nonsense' is not a reasoning-gym entry"):
        gym.score("1", "nonsense")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(VerifierError, match=r'pip install -e ".*\[gym\]"'):
        get_verifier("reasoning-gym")
