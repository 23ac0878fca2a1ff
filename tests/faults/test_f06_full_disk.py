"""F6: the disk is full while a checkpoint is written. The old one stays whole and the run stops with exit code 4."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from mel_lite.errors import DiskFullError
from mel_lite.resilience import checkpoint_files, state_files
from mel_lite.resilience.checkpoints import is_full
from trainers import build, run_state

COMMON: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def full_disk(monkeypatch: pytest.MonkeyPatch, trainer: Any) -> None:
    """Make the commit after step 2 fail as the system reports a full disk."""
    original = trainer._commit

    def commit(run_dir: Path) -> None:
        if trainer.state.global_step != 2:
            return original(run_dir)
        raise OSError(28, os.strerror(28), str(run_dir / checkpoint_files.STAGING))

    monkeypatch.setattr(trainer, "_commit", commit)


@pytest.mark.slow
def test_the_run_stops_with_the_last_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, **COMMON)
    full_disk(monkeypatch, trainer)
    with pytest.raises(DiskFullError, match=r"no room for checkpoint-2 .*checkpoint-1 is whole") as error:
        trainer.train()
    assert error.value.exit_code == 4
    run = tmp_path / "run"
    assert [p.name for p in checkpoint_files.committed(run)] == ["checkpoint-1"]
    assert checkpoint_files.problem(run / "checkpoint-1") is None
    assert not (run / checkpoint_files.STAGING).exists()
    resumed = build(tmp_path, **COMMON)
    resumed.train(resume_from_checkpoint=True)
    whole = build(tmp_path, output_dir=tmp_path / "whole", **COMMON)
    whole.train()
    assert run_state(resumed) == run_state(whole)


def test_full_disk_errors_of_each_library_are_recognized(tmp_path: Path) -> None:
    """Real errors of the kernel, through Python and through safetensors' own writer."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError) as refused:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    assert is_full(refused.value)
    assert is_full(safetensors.SafetensorError("I/O error: No space left on device (os error 28)"))
    assert is_full(RuntimeError("database or disk is full"))
    assert not is_full(OSError(5, "Input/output error")) and not is_full(ValueError("full of errors"))


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs POSIX limits")
def test_a_write_the_kernel_cuts_short_leaves_no_half_state(tmp_path: Path) -> None:
    """The closest substitute for a full disk without root: no file may grow beyond 4 kB."""
    import signal

    import torch

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    staged = checkpoint_files.staging_folder(tmp_path) / "checkpoint-1"
    staged.mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(Exception, match="File too large|os error 27"):
            state_files.dump(staged / "optimizer", {"w": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint_files.committed(tmp_path) == []


def test_low_disk_space_is_reported_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    trainer = build(tmp_path, **COMMON | {"max_steps": 1, "save_total_limit": 3})
    weights = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    needed_bytes = 12 * weights * 4
    for free_bytes, warned in ((needed_bytes, False), (needed_bytes - 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free_bytes: usage._replace(free=free))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mel_lite.resilience.disk"):
            trainer._warn_of_little_space()
        assert ("4 checkpoints of" in caplog.text) == warned
