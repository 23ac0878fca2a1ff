"""Figures of docs/reliability.md that belong to no single fault: cost of a commit, the leak guard on its corpus."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mel_lite import checkpoint
from test_leakage import CORPUS, check_case

STEP_S = 60.0
"""A step of 8 prompts x 8 completions of 1,000 tokens on one GPU takes minutes; this is on the low side."""


@pytest.mark.slow
def test_a_commit_costs_less_than_a_hundredth_of_a_step(tmp_path: Path, record_property: Any) -> None:
    """100 MB: a rank-32 adapter of a 7B model in bfloat16 with both moments is about 300 MB, of a 1B model 60 MB."""
    times_s = []
    for step in range(5):
        staged = checkpoint.staging_folder(tmp_path) / f"checkpoint-{step}"
        staged.mkdir()
        for part in range(4):
            save_file({"w": torch.randn(25 * 2**20 // 4)}, staged / f"{part}.safetensors")
        start_s = time.monotonic()
        checkpoint.commit(staged, tmp_path, {"step": step})
        times_s.append(time.monotonic() - start_s)
        checkpoint.rotate(tmp_path, keep=1, best=None)
    commit_s = sorted(times_s)[2]
    record_property("commit_100mb_s", commit_s)
    assert commit_s < 0.01 * STEP_S


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
