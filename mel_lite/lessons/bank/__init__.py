"""Kept heuristics with running scores, found again for later questions."""

from __future__ import annotations

from mel_lite.lessons.bank.bank import LessonBank, examine, lessons_of_state, notes_text
from mel_lite.types import BankLesson

__all__ = ["BankLesson", "LessonBank", "examine", "lessons_of_state", "notes_text"]
