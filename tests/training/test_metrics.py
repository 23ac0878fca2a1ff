"""Metrics of a step: the funnel of lessons, gradients of the loss terms, and the file they are written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mel_lite.training.metrics import GradientMeter, truncate_metrics
from trainers import assert_learned, build


def test_gradients_of_a_term_add_up_over_micro_batches() -> None:
    import torch

    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    unused = torch.nn.Parameter(torch.ones(3))
    meter = GradientMeter([weight, unused])
    for scale in (1.0, 2.0):
        meter.add("policy", scale * weight[0])
    meter.add("nll", 4.0 * weight[1] - 3.0 * weight[0])
    metrics = meter.drain(lambda t: t)
    assert metrics == {
        "mel/grad_norm_policy": 3.0,
        "mel/grad_norm_nll": 5.0,
        "mel/grad_cosine": pytest.approx(-9 / 15),
    }
    assert meter.drain(lambda t: t) == {} and weight.grad is None


def test_resuming_drops_later_and_half_written_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 0.5}\n{"step": 2}\n{"step": 3}\n{"step": 2, "rew')
    truncate_metrics(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    truncate_metrics(tmp_path / "none.jsonl", 2)


def test_seconds_of_a_phase_are_means_over_all_steps_of_a_log(tmp_path: Path) -> None:
    """The report multiplies them by the steps. Only every second of these steps samples."""
    trainer = build(tmp_path, max_steps=4, num_iterations=2, logging_steps=4)
    seconds_s: dict[str, float] = {}
    trainer.clock.on_end = lambda end: seconds_s.update({end.name: seconds_s.get(end.name, 0.0) + end.seconds_s})
    trainer.train()
    assert_learned(trainer)
    row = trainer.state.log_history[0]
    for phase in ("rollout", "analysis", "update"):
        assert 4 * row[f"time/{phase}_s"] == pytest.approx(seconds_s[phase], abs=1e-6)
