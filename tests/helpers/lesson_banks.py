"""Lesson banks for tests: rules on made-up operators, and run folders that hold them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiences import experience
from mel_lite.lessons.bank import LessonBank
from mel_lite.types import BankOptions, Experience, MetaExperience, Prompt


def rule(op: str, reading: str) -> str:
    """Return the rule of the learning study."""
    return f"- If I see {op}, then {op} is {reading}."


def kept(heuristic: str, question: Prompt, step: int = 3) -> Experience:
    """A kept meta-experience with this heuristic on this question."""
    return replace(experience(step, prompt=question), parsed=MetaExperience("b", "c", heuristic))


def bank_of(*lessons: tuple[str, str], **options: Any) -> LessonBank:
    """A bank of (operator, reading) rules with ids from 1, each from a question with that operator alone."""
    bank = LessonBank(BankOptions(**options))
    for id_, (op, reading) in enumerate(lessons, start=1):
        bank.add(id_, kept(rule(op, reading), f"3 {op} 7?"))
    return bank


def write_checkpoint(run: Path, bank: LessonBank | None, step: int = 4) -> Path:
    """Write the part of a checkpoint that holds the position and the bank."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = {"step": step} | ({} if bank is None else bank.state_dict())
    (folder / "mel_state.json").write_text(json.dumps(state))
    return folder


def truth(heuristic: str) -> bool | None:
    """A user's truth: zap is from, nothing is known of lor, all else is wrong."""
    return None if "lor" in heuristic else "zap is from" in heuristic


def no_truth(heuristic: str) -> str:
    """A user's truth that returns a word."""
    return "yes"
