"""F4, F5, F7: damaged checkpoints are skipped, exit code 3 if all are damaged, and rotation deletes the right ones.

tests/resilience/test_checkpoint_files.py tests each kind of damage.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command_line import mel_lite_command
from mel_lite.recipe import resolve
from mel_lite.resilience import checkpoint_files
from trainers import assert_learned, build, run_state

COMMON: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("finished")
    trainer = build(folder, **COMMON)
    trainer.train()
    assert_learned(trainer)
    return folder, run_state(trainer)


def names(folder: Path) -> list[str]:
    newest = folder / "run" / "checkpoint-3"
    return sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())


@pytest.mark.parametrize("how", ["bit flipped", "truncated"])
def test_every_file_of_a_real_checkpoint_is_guarded(finished: Any, tmp_path: Path, how: str) -> None:
    folder, _ = finished
    rng = random.Random(how)
    guarded = names(folder)
    assert {"adapter_model.safetensors", "optimizer.safetensors", "rng_state.json", "manifest.json"} <= set(guarded)
    for name in guarded:
        run = tmp_path / name.replace("/", "_")
        shutil.copytree(folder / "run", run)
        path = run / "checkpoint-3" / name
        content = bytearray(path.read_bytes())
        if how == "truncated":
            del content[rng.randrange(len(content)) :]
        else:
            bit = rng.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(content))
        assert checkpoint_files.resolve(run, True).name == "checkpoint-2", name
        assert (run / "checkpoint-3.corrupt" / name).read_bytes() == bytes(content), "set aside, not deleted"


def test_the_run_resumes_from_the_previous_checkpoint(finished: Any, tmp_path: Path) -> None:
    folder, state = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.copytree(folder / "base", tmp_path / "base")
    adapter = tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-100])
    resumed = build(tmp_path, **COMMON)
    resumed.train(resume_from_checkpoint=True)
    assert {**run_state(resumed), "scheduler": ""} == {**state, "scheduler": ""}


def everything(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.slow
def test_all_damaged_is_exit_3_and_nothing_is_touched(finished: Any, tmp_path: Path) -> None:
    folder, _ = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(resolve(preset="cpu").as_yaml())
    for saved in checkpoint_files.committed(tmp_path / "run"):
        (saved / "trainer_state.json").write_text("{}")
    before = everything(tmp_path)
    done = mel_lite_command("train", "--resume", "--output-dir", tmp_path / "run")
    assert done.returncode == 3, done.stderr
    for step in (1, 2, 3):
        assert f"checkpoint-{step}: trainer_state.json differs" in done.stderr
    assert "Traceback" not in done.stderr
    assert everything(tmp_path) == before


STEPS = st.lists(st.integers(1, 20_000), min_size=1, max_size=8, unique=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, limit=st.integers(1, 5), best=st.integers(0, 7), seed=st.integers(0, 99))
def test_rotation_keeps_the_newest_and_the_best(
    tmp_path: Path, steps: list[int], limit: int, best: int, seed: int
) -> None:
    """Rotation goes by step number, not by modification time."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    steps = sorted(steps)
    best_step = steps[best % len(steps)]
    rng = random.Random(seed)
    for step in steps:
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        os.utime(folder, (rng.random() * 1e9, rng.random() * 1e9))
    checkpoint_files.rotate(run, keep=limit, best=str(run / f"checkpoint-{best_step}"))
    left = [int(p.name.split("-")[1]) for p in checkpoint_files.committed(run)]
    assert steps[-1] in left and best_step in left
    assert len(left) == min(len(steps), max(limit, len({steps[-1], best_step})))
    others = [step for step in left if step not in (steps[-1], best_step)]
    gone = set(steps) - set(left)
    assert all(step > max(gone, default=0) for step in others), "the oldest are deleted first"


def test_nothing_is_deleted_before_the_new_one_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one checkpoint to keep, the complete old one exists until the rename."""
    trainer = build(tmp_path, **COMMON | {"max_steps": 2, "save_total_limit": 1})
    run, seen = tmp_path / "run", []
    original = checkpoint_files.commit

    def commit(*args: Any) -> Path:
        seen.append([path.name for path in checkpoint_files.committed(run)])
        final = original(*args)
        seen.append([path.name for path in checkpoint_files.committed(run)])
        return final

    monkeypatch.setattr(checkpoint_files, "commit", commit)
    trainer.train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert [path.name for path in checkpoint_files.committed(run)] == ["checkpoint-2"]
