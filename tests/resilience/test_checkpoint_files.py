"""Checkpoints: whole or not there, and a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mel_lite.errors import CheckpointError, ModelError
from mel_lite.resilience import checkpoint_files
from tiny_models import save_tiny
from trainers import assert_learned, build, digest, run_state, step_log, tiny_model, trainable


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, scheduler: str) -> None:
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": scheduler}
    whole = build(tmp_path, output_dir=tmp_path / "whole", **common)
    whole.train()
    assert_learned(whole)

    # Stopped in its third step, after that step's experiences were written: they are redone, not doubled.
    cut = build(tmp_path, output_dir=tmp_path / "cut", **common)
    original = cut._compute_loss

    def dies(model: Any, inputs: Any) -> Any:
        if cut.state.global_step == 2:
            raise RuntimeError("power cut")
        return original(model, inputs)

    cut._compute_loss = dies
    with pytest.raises(RuntimeError, match="power cut"):
        cut.train()
    assert cut.store.last_id() > checkpoint_files.read_state(tmp_path / "cut" / "checkpoint-2")["last_experience_id"]

    resumed = build(tmp_path, output_dir=tmp_path / "cut", **common)
    resumed.train(resume_from_checkpoint=True)
    assert run_state(resumed) == run_state(whole)
    assert step_log(tmp_path / "cut") == step_log(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "mel_state.json"):
        ours, theirs = (tmp_path / run / "checkpoint-4" / name for run in ("cut", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_run_whose_last_step_was_saved_is_not_trained_further(tmp_path: Path) -> None:
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = build(tmp_path, **common)
    whole.train()
    again = build(tmp_path, **common)
    again.train(resume_from_checkpoint=True)
    assert digest(trainable(again)) == digest(trainable(whole)) and again.state.global_step == 2
    assert [p.name for p in checkpoint_files.committed(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    assert again.funnel_totals == whole.funnel_totals and again.funnel_totals["mel/groups"] == 4


@pytest.mark.slow
def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    common = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = build(tmp_path, **common)
    whole.train()
    run = tmp_path / "run"
    again = build(tmp_path, **common)
    again.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert run_state(again)["weights"] == run_state(whole)["weights"]
    assert run_state(again)["experiences"] == run_state(whole)["experiences"]
    assert {p.name for p in run.glob("*.superseded")} == {"checkpoint-2.superseded", "checkpoint-3.superseded"}
    assert [p.name for p in checkpoint_files.committed(run)] == [f"checkpoint-{step}" for step in (1, 2, 3)]


def test_a_checkpoint_of_another_base_is_refused(tmp_path: Path) -> None:
    common = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    build(tmp_path, **common).train()
    save_tiny(tmp_path / "other", seed=5)
    other = build(tmp_path, model=tiny_model(tmp_path / "other"), **{**common, "max_steps": 2})
    with pytest.raises(ModelError, match="on another base it is meaningless"):
        other.train(resume_from_checkpoint=True)


def test_the_layout_is_trls_and_pefts(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.train()
    run = tmp_path / "run"
    assert [p.name for p in checkpoint_files.committed(run)] == ["checkpoint-2"]
    names = {p.name for p in (run / "checkpoint-2").iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "trainer_state.json", "tokenizer.json"}
    assert names >= {"optimizer.safetensors", "scheduler.json", "rng_state.json", "mel_state.json", "manifest.json"}
    assert not list(run.glob(f"{checkpoint_files.STAGING}*")), "staging is swept"
    assert checkpoint_files.problem(run / "checkpoint-2") is None


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    """A run folder with three committed checkpoints of two files."""
    for step in (9, 10, 100):
        staged = checkpoint_files.staging_folder(tmp_path) / f"checkpoint-{step}"
        (staged / "sub").mkdir(parents=True)
        (staged / "weights.bin").write_bytes(bytes([step]) * 1000)
        (staged / "sub" / "state.json").write_text("{}")
        checkpoint_files.commit(staged, tmp_path, {"step": step})
    return tmp_path


def test_checkpoints_are_ordered_by_step_not_by_name(saved: Path) -> None:
    assert [p.name for p in checkpoint_files.committed(saved)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert checkpoint_files.resolve(saved, True).name == "checkpoint-100"
    assert checkpoint_files.read_state(saved / "checkpoint-100") == {"step": 100}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "garbled manifest"])
@pytest.mark.parametrize("name", ["weights.bin", "sub/state.json", "mel_state.json"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    saved: Path, damage: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = saved / "checkpoint-100"
    content = (newest / name).read_bytes()
    if damage == "flip":
        (newest / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "truncate":
        (newest / name).write_bytes(content[:-1])
    elif damage == "remove":
        (newest / name).unlink()
    elif damage == "no manifest":
        (newest / checkpoint_files.MANIFEST).unlink()
    else:
        (newest / checkpoint_files.MANIFEST).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert checkpoint_files.resolve(saved, True).name == "checkpoint-10"
    assert (saved / "checkpoint-100.corrupt").is_dir() and not newest.exists()
    assert (checkpoint_files.MANIFEST if "manifest" in damage else name) in caplog.text


def test_when_none_is_whole_all_are_listed_and_kept(saved: Path) -> None:
    for path in checkpoint_files.committed(saved):
        (path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        checkpoint_files.resolve(saved, True)
    assert all(f"checkpoint-{step}: weights.bin differs" in str(error.value) for step in (9, 10, 100))
    assert len(checkpoint_files.committed(saved)) == 3 and error.value.exit_code == 3


def test_nothing_to_resume_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint-N folder"):
        checkpoint_files.resolve(tmp_path, True)
    with pytest.raises(CheckpointError, match="is not a folder"):
        checkpoint_files.resolve(tmp_path, str(tmp_path / "checkpoint-3"))


def test_an_interrupted_save_leaves_the_last_one_and_is_swept(saved: Path) -> None:
    staged = checkpoint_files.staging_folder(saved) / "checkpoint-101"
    staged.mkdir()
    (staged / "weights.bin").write_bytes(b"half")
    assert checkpoint_files.resolve(saved, True).name == "checkpoint-100"
    assert not any(checkpoint_files.staging_folder(saved).iterdir())


def test_rotation_keeps_newest_and_best(saved: Path) -> None:
    checkpoint_files.rotate(saved, keep=None, best=None)
    assert len(checkpoint_files.committed(saved)) == 3
    checkpoint_files.rotate(saved, keep=1, best=str(saved / "checkpoint-9"))
    assert [p.name for p in checkpoint_files.committed(saved)] == ["checkpoint-9", "checkpoint-100"]
    checkpoint_files.rotate(saved, keep=1, best=None)
    assert [p.name for p in checkpoint_files.committed(saved)] == ["checkpoint-100"]


def test_a_redone_step_replaces_its_checkpoint(saved: Path) -> None:
    staged = checkpoint_files.staging_folder(saved) / "checkpoint-100"
    staged.mkdir()
    (staged / "weights.bin").write_bytes(b"again")
    checkpoint_files.commit(staged, saved, {"step": 100})
    assert (saved / "checkpoint-100" / "weights.bin").read_bytes() == b"again"
    assert checkpoint_files.problem(saved / "checkpoint-100") is None
