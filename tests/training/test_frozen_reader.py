"""The policy of the start, read by a policy that has moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mel_lite.training.frozen_reader import FILE_NAME, FrozenReader
from mel_lite.types import Lesson
from tiny_models import set_lora
from trainers import assert_learned, build, digest, run_state, step_log, trainable

TEXTS = [Lesson(0, tuple(range(10, 30)), tuple(range(40, 60))), Lesson(0, (5, 6), (7, 8, 9))]
FROZEN: dict[str, Any] = {
    "internalisation": "distill",
    "internalisation_options": {"context": "sibling", "reader": "frozen"},
}


def test_it_reads_with_the_start_weights_after_updates(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=2, **FROZEN)
    start = trainer.scorer.logps(TEXTS)
    trainer.train()
    assert_learned(trainer)
    weights = digest(trainable(trainer))
    frozen = trainer.scorer.logps(TEXTS, frozen=True)
    hidden = trainer.scorer.read(TEXTS, frozen=True)
    assert all(torch.equal(a, b) for a, b in zip(frozen, start, strict=True))
    assert all(torch.equal(a.logp_T, b) for a, b in zip(hidden, start, strict=True))
    assert digest(trainable(trainer)) == weights, "the current weights are back"
    moved = trainer.scorer.logps(TEXTS)
    assert max((a - b).abs().max().item() for a, b in zip(moved, start, strict=True)) > 1e-3


def test_the_current_weights_come_back_when_reading_fails(tmp_path: Path) -> None:
    trainer = build(tmp_path, **FROZEN)
    set_lora(trainer.model, 0.2)
    weights = digest(trainable(trainer))
    with pytest.raises(RuntimeError, match="out"), trainer.frozen_reader.reading():
        assert digest(trainable(trainer)) != weights
        raise RuntimeError("out of memory")
    assert digest(trainable(trainer)) == weights


def test_only_a_way_that_needs_it_keeps_a_copy(tmp_path: Path) -> None:
    moving: dict[str, Any] = {"internalisation": "distill", "internalisation_options": {"context": "sibling"}}
    assert build(tmp_path, **moving).frozen_reader is None
    assert build(tmp_path, algorithm="grpo", **FROZEN).frozen_reader is None
    assert build(tmp_path, **FROZEN).frozen_reader is not None


def start_from(trainer: Any, seed: int) -> None:
    """Let a run begin with an adapter that is not zero, as one that continues an earlier run's."""
    set_lora(trainer.model, 0.2, seed=seed)
    trainer.frozen_reader = FrozenReader(trainer.model)


@pytest.mark.slow
def test_a_resumed_run_reads_with_the_start_weights_of_the_run(tmp_path: Path) -> None:
    """Two updates per batch, and the process that resumes starts with another adapter."""
    options: dict[str, Any] = {
        **FROZEN, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2,
    }  # fmt: skip
    whole = build(tmp_path, output_dir=tmp_path / "whole", **options)
    start_from(whole, seed=1)
    start = whole.scorer.logps(TEXTS)
    whole.train()
    assert_learned(whole)
    assert any(line["mel/taught_rows"] for line in step_log(tmp_path / "whole"))

    cut = build(tmp_path, output_dir=tmp_path / "cut", **options)
    start_from(cut, seed=1)
    original = cut._compute_loss

    def dies(model: Any, inputs: Any) -> Any:
        if cut.state.global_step == 3:
            raise RuntimeError("power cut")
        return original(model, inputs)

    cut._compute_loss = dies
    with pytest.raises(RuntimeError, match="power cut"):
        cut.train()
    assert (tmp_path / "cut" / "checkpoint-2" / FILE_NAME).is_file()

    resumed = build(tmp_path, output_dir=tmp_path / "cut", **options)
    start_from(resumed, seed=2)
    resumed.train(resume_from_checkpoint=True)
    assert run_state(resumed) == run_state(whole)
    assert step_log(tmp_path / "cut") == step_log(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed.scorer.logps(TEXTS, frozen=True), start, strict=True))
