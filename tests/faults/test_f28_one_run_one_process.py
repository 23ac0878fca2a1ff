"""F28: two processes on one run folder, a clock that goes backwards, a folder that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mel_lite.engines.metered import PhaseClock
from mel_lite.errors import ConfigError
from mel_lite.run.folder import run_folder
from trainers import assert_learned, build, digest, step_log, trainable

HOLDER = """
import sys, time
from pathlib import Path
from mel_lite.run.folder import run_folder
with run_folder(Path(sys.argv[1]), resume=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_with_the_pid_of_the_first_and_changes_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ConfigError, match=rf"in use by another process \(pid {holder.pid}\)"):
            with run_folder(tmp_path, resume=True):
                raise AssertionError("the lock was not kept")
        assert sorted(tmp_path.iterdir()) == before
    finally:
        holder.kill()
        holder.wait()
    with run_folder(tmp_path, resume=True):
        pass  # a killed process holds no lock


def test_a_clock_that_goes_backwards_changes_nothing_but_dates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = build(tmp_path, output_dir=tmp_path / "plain", max_steps=2)
    plain.train()
    now_s = [time.time()]

    def backwards() -> float:
        now_s[0] -= 3600
        return now_s[0]

    monkeypatch.setattr(time, "time", backwards)
    clock = PhaseClock()
    with clock("rollout"):
        time.sleep(0.01)
    assert 0.01 <= clock.drain()["time/rollout_s"] < 3600
    trainer = build(tmp_path, max_steps=2)
    trainer.train()
    assert_learned(trainer)
    assert digest(trainable(trainer)) == digest(trainable(plain))
    assert step_log(tmp_path / "run") == step_log(tmp_path / "plain")


def test_a_folder_that_cannot_be_made_is_an_early_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        with run_folder(tmp_path / "file" / "run", resume=False):
            pass


NOBODY = 65534


def test_a_read_only_folder_is_an_early_error() -> None:
    """Root may write anywhere, so as root the test switches to another user."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as place:  # not tmp_path, whose parents other users cannot access
        Path(place).chmod(0o555)
        try:
            if is_root:
                os.seteuid(NOBODY)
            with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
                with run_folder(Path(place) / "run", resume=False):
                    pass
        finally:
            if is_root:
                os.seteuid(0)
            Path(place).chmod(0o700)
