"""Figures of docs/reliability.md not tied to a single fault: cost of a save, the demo, the leak guard's corpus."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from leak_cases import CORPUS, check_case
from mel_lite import signals
from mel_lite.models.load import load_tokenizer
from mel_lite.recipe import resolve
from mel_lite.resilience import checkpoint_files
from mel_lite.run import train as run


@pytest.mark.slow
def test_commits_of_100_mb(tmp_path: Path, record_property: Any) -> None:
    """A rank-32 adapter of a 7B model in bfloat16 with both moments is about 300 MB, of a 1B model 60 MB."""
    times_s = []
    for step in range(5):
        staged = checkpoint_files.staging_folder(tmp_path) / f"checkpoint-{step}"
        staged.mkdir()
        for part in range(4):
            save_file({"w": torch.randn(25 * 2**20 // 4)}, staged / f"{part}.safetensors")
        start_s = time.monotonic()
        checkpoint_files.commit(staged, tmp_path, {"step": step})
        times_s.append(time.monotonic() - start_s)
        checkpoint_files.rotate(tmp_path, keep=1, best=None)
    record_property("commit_100mb_s", sorted(times_s)[2])
    (newest,) = checkpoint_files.committed(tmp_path)
    assert newest.name == "checkpoint-4" and checkpoint_files.problem(newest) is None


def demo_trainer(folder: Path) -> Any:
    """Build the trainer of `mel-lite train --gpu cpu`: the real model, engine, tasks and batch."""
    recipe = resolve(preset="cpu")
    args = run.check(recipe, folder)
    tokenizer = load_tokenizer(recipe.model)
    tasks = run.load_run_tasks(recipe, args, tokenizer)
    quiet = Console(quiet=True)
    return run._build_trainer(recipe, args, tokenizer, tasks, quiet)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_demo_saves_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Any) -> None:
    """One real step, its save, and SIGTERM one second into the sampling of the next.

    A save includes weights, moments, random state, hashes, flush and rename. A signal in any phase is handled at the
    next poll, so the longest time to the exit is the longest time between two polls plus a save.
    """
    trainer = demo_trainer(tmp_path)
    save, generate, poll = trainer._save_checkpoint, trainer.engine.generate, signals.poll
    saves_s, polls_s, sent_s = list[float](), list[float](), list[float]()

    def timed_save(*args: Any) -> None:
        start_s = time.monotonic()
        save(*args)
        saves_s.append(time.monotonic() - start_s)

    def noted_poll() -> None:
        polls_s.append(time.monotonic())
        poll()

    def signalled_generate(*args: Any) -> Any:
        if trainer.state.global_step == 1:
            sent_s.append(time.monotonic() + 1.0)
            threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
        return generate(*args)

    trainer._save_checkpoint, trainer.engine.generate = timed_save, signalled_generate
    monkeypatch.setattr(signals, "poll", noted_poll)
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    exit_s = time.monotonic() - sent_s[0]
    assert stop.value.code == 143
    assert [path.name for path in checkpoint_files.committed(tmp_path)] == ["checkpoint-1"]
    assert checkpoint_files.problem(tmp_path / "checkpoint-1") is None
    (step_s,) = (json.loads(line)["step_time"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    longest_s = max(after - before for before, after in pairwise(polls_s))
    share = saves_s[0] / (trainer.args.save_steps * step_s)
    for name, value in (("step_s", step_s), ("save_s", saves_s[0]), ("save_share", share), ("exit_s", exit_s),
                        ("longest_s", longest_s + saves_s[0])):  # fmt: skip
        record_property(f"demo_{name}", value)


def test_recall_and_false_positives_of_the_leak_guard(record_property: Any) -> None:
    leaks = [case for case in CORPUS if case["leak"]]
    clean = [case for case in CORPUS if not case["leak"]]
    found = sum(bool(check_case(case).leaks) for case in leaks)
    alarms = sum(bool(check_case(case).leaks) for case in clean)
    record_property("leak_corpus", len(CORPUS))
    record_property("leak_recall", found / len(leaks))
    record_property("leak_false_positives", alarms / len(clean))
    assert len(CORPUS) >= 400
    assert found >= 0.99 * len(leaks) and alarms <= 0.03 * len(clean)
