"""The experience store: every meta-experience of a run, and the token credit of its rollouts, in a SQLite file."""

from mel_lite.lessons.store.credit import Effect, TokenCredit
from mel_lite.lessons.store.rows import SCHEMA_VERSION, ExperienceRow, Outline
from mel_lite.lessons.store.store import FILE_NAME, ExperienceStore

__all__ = ["FILE_NAME", "SCHEMA_VERSION", "Effect", "ExperienceRow", "ExperienceStore", "Outline", "TokenCredit"]
