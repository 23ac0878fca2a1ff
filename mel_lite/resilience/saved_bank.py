"""Lesson banks of earlier runs: from the newest checkpoint, or from the experience store of a run without a bank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mel_lite.errors import CheckpointError, ConfigError
from mel_lite.lessons.bank import LessonBank, lessons_of_state
from mel_lite.lessons.prompts import Templates, load_templates
from mel_lite.lessons.store import FILE_NAME, ExperienceStore
from mel_lite.models.chat import question_text
from mel_lite.recipe import value_in
from mel_lite.resilience import checkpoint_files
from mel_lite.types import BankLesson, BankOptions, Status

if TYPE_CHECKING:
    from mel_lite.config import MELConfig


def saved_lessons(folder: Path, *, field: str = "lessons_from") -> list[BankLesson]:
    """Return the lessons of a run or checkpoint folder, oldest first, retired ones included.

    A run's newest checkpoint is read. If it has no bank, the kept meta-experiences of the run's store are the lessons,
    each with score 1; repetitions of a rule are merged.

    Raises: ConfigError, naming `field`, for a folder without a checkpoint with a bank and without a store;
    CheckpointError for a damaged bank; StoreError for a damaged store.
    """
    checkpoints = [folder] if (folder / checkpoint_files.STATE).is_file() else checkpoint_files.committed(folder)[-1:]
    for checkpoint in checkpoints:
        try:
            lessons = lessons_of_state(checkpoint_files.read_state(checkpoint))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint / checkpoint_files.STATE} has no usable lesson bank ({type(error).__name__}: {error}). "
                "Name an earlier checkpoint of that run."
            ) from error
        if lessons is not None:
            return lessons
    run = folder.parent if checkpoints == [folder] else folder
    if not (run / FILE_NAME).is_file():
        raise ConfigError(
            f"{field}={str(folder)!r} holds no lessons: neither a checkpoint with a bank nor {FILE_NAME}. Name the "
            "folder of a run that trained with meta-experience."
        )
    return _stored_lessons(run)


def _stored_lessons(run: Path) -> list[BankLesson]:
    with ExperienceStore(run / FILE_NAME, read_only=True) as store:
        return kept_lessons(store)


def kept_lessons(store: ExperienceStore) -> list[BankLesson]:
    """Return the kept meta-experiences of a store as lessons with score 1, oldest first; repeated rules are merged."""
    rows = store.list(status=Status.KEPT)
    bank = LessonBank(BankOptions(size=max(1, len(rows))))
    bank.extend(
        BankLesson(row.id, row.heuristic or "", question_text(row.prompt), 1.0, 1, False, row.step) for row in rows
    )
    return bank.lessons


def saved_bank(folder: Path, *, field: str) -> tuple[LessonBank, Templates]:
    """Return the bank of a run or checkpoint folder and the run's templates, with the options in its config.yaml.

    Raises: as `saved_lessons`; ConfigError also for a folder whose bank has no lesson that teaches, and for templates
    that cannot be read.
    """
    lessons = saved_lessons(folder, field=field)
    config = next((path for path in (folder / "config.yaml", folder.parent / "config.yaml") if path.is_file()), None)
    given = {name: value_in(config, f"train.bank_{name}") for name in BankOptions.__dataclass_fields__}
    bank = LessonBank(BankOptions(**{name: value for name, value in given.items() if value is not None}))
    bank.extend(lessons)
    if not any(lesson.score >= bank.options.teach_from for lesson in lessons):
        raise ConfigError(
            f"{field}={str(folder)!r}: none of its {len(lessons)} lessons has the score to teach "
            f"({bank.options.teach_from}). Name another run; `mel-lite experiences bank` lists scores."
        )
    return bank, load_templates(value_in(config, "train.templates"))


def build_bank(args: MELConfig, *, used: bool) -> LessonBank | None:
    """Return a run's bank: with the lessons of `lessons_from`, else empty; None unless it is used or seeded.

    Raises: ConfigError for a retrieval or a folder that does not exist, and as `saved_lessons`.
    """
    if not args.with_meta_experience or not (used or args.lessons_from):
        return None
    bank = LessonBank(args.bank_options)
    if args.lessons_from:
        bank.adopt(saved_lessons(Path(args.lessons_from)))
    return bank


__all__ = ["build_bank", "kept_lessons", "saved_bank", "saved_lessons"]
