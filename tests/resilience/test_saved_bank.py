"""Banks of earlier runs: which folder's lessons are read, with which options, and the folders without any."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiences import experience
from lesson_banks import bank_of, kept, rule, write_checkpoint
from mel_lite.config import MELConfig
from mel_lite.errors import CheckpointError, ConfigError, StoreError
from mel_lite.lessons.store import ExperienceStore
from mel_lite.resilience.saved_bank import build_bank, saved_bank, saved_lessons
from mel_lite.types import BankLesson, Status


def stored_run(folder: Path) -> Path:
    """A run folder with a store of two rules, one of them kept twice, and a dropped one."""
    folder.mkdir(exist_ok=True)
    zap, dax = rule("zap", "from"), rule("dax", "add")
    with ExperienceStore(folder / "experiences.sqlite") as store:
        store.add([
            kept(zap, [{"role": "system", "content": "s"}, {"role": "user", "content": "3 zap 7?"}]),
            experience(4, Status.LEAKED),
            kept(dax, "1 dax 2?", step=5),
            kept(zap, "9 zap 9?", step=6),
        ])  # fmt: skip
    return folder


STORED = [
    BankLesson(1, rule("zap", "from"), "3 zap 7?", 2.0, 2, False, 4),
    BankLesson(3, rule("dax", "add"), "1 dax 2?", 1.0, 1, False, 6),
]


def test_a_runs_newest_checkpoint_holds_its_lessons(tmp_path: Path) -> None:
    stored_run(tmp_path)
    old, new = bank_of(("lor", "take")), bank_of(("zap", "from"), ("lor", "take"))
    new.reexamine([(1, 0.3), (2, -1.0), (2, -0.5)])
    write_checkpoint(tmp_path, old, step=8)
    write_checkpoint(tmp_path, new, step=12)
    assert saved_lessons(tmp_path) == new.lessons and new.lessons[1].retired
    assert saved_lessons(tmp_path / "checkpoint-8") == old.lessons


@pytest.mark.parametrize("inside", [True, False])
def test_without_a_bank_the_kept_rows_of_the_store_are_the_lessons(tmp_path: Path, inside: bool) -> None:
    stored_run(tmp_path)
    folder = write_checkpoint(tmp_path, None) if inside else tmp_path
    assert saved_lessons(folder) == STORED


def test_an_empty_bank_is_not_replaced_by_the_store(tmp_path: Path) -> None:
    stored_run(tmp_path)
    write_checkpoint(tmp_path, bank_of())
    assert saved_lessons(tmp_path) == []


def test_folders_without_lessons_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lessons_from='.*nowhere' holds no lessons: neither .* nor experiences.sq"):
        saved_lessons(tmp_path / "nowhere")
    broken = write_checkpoint(tmp_path, bank_of(("zap", "from")))
    state = json.loads((broken / "mel_state.json").read_text())
    for damage in ({"lessons": [{"id": 1}]}, {"lesson": []}, 4, {"lessons": 4}):
        (broken / "mel_state.json").write_text(json.dumps(state | {"lesson_bank": damage}))
        with pytest.raises(CheckpointError, match=r"checkpoint-4.mel_state.json has no usable lesson bank \(.*earlier"):
            saved_lessons(tmp_path)
    shutil.rmtree(broken)
    (tmp_path / "experiences.sqlite").write_text("not a database")
    with pytest.raises(StoreError, match="Check that mel-lite wrote this file"):
        saved_lessons(tmp_path)


def test_a_saved_bank_has_the_options_and_templates_of_its_run(tmp_path: Path) -> None:
    bank = bank_of(("zap", "from"), ("dax", "add"))
    write_checkpoint(tmp_path, bank)
    question = "1 zap 2 dax 3?"
    plain, templates = saved_bank(tmp_path, field="--with-lessons")
    assert {each.id for each in plain.retrieve(question)} == {1, 2} and templates.version == "1"
    (tmp_path / "t.yaml").write_text("replay_user: '{experience} {question}'\nversion: mine")
    (tmp_path / "config.yaml").write_text(f"train: {{bank_limit: 1, templates: {tmp_path / 't.yaml'}}}")
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        limited, templates = saved_bank(folder, field="--with-lessons")
        assert len(limited.retrieve(question)) == 1 and templates.version == "mine"
    (tmp_path / "config.yaml").write_text("train: {bank_teach_from: 1.5}")
    with pytest.raises(ConfigError, match=r"--with-lessons='.*': none of its 2 lessons has the score to teach \(1.5\)"):
        saved_bank(tmp_path, field="--with-lessons")


def config(folder: Path, **options: Any) -> MELConfig:
    return MELConfig(str(folder / "out"), use_cpu=True, bf16=False, **options)


def test_a_run_has_a_bank_if_its_way_uses_one_or_lessons_are_given(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    assert build_bank(config(tmp_path), used=False) is None
    assert build_bank(config(tmp_path, algorithm="grpo"), used=True) is None
    empty = build_bank(config(tmp_path, bank_size=3), used=True)
    assert empty is not None and len(empty) == 0 and empty.options.size == 3
    seeded = build_bank(config(tmp_path, lessons_from=str(run)), used=False)
    assert seeded is not None
    assert [(each.id, each.heuristic, each.score, each.votes, each.step) for each in seeded.lessons] == [
        (-1, rule("zap", "from"), 2.0, 2, 0),
        (-2, rule("dax", "add"), 1.0, 1, 0),
    ]
    with pytest.raises(ConfigError, match="lessons_from='nowhere' holds no lessons"):
        build_bank(config(tmp_path, lessons_from="nowhere"), used=True)
    with pytest.raises(ConfigError, match="bank_retrieval='lexcal' is unknown"):
        build_bank(config(tmp_path, bank_retrieval="lexcal"), used=True)
