"""Metrics of a step: the funnel of lessons, gradients of the loss terms, and the file they are written to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mel_lite.training.metrics import GradientMeter, truncate_metrics


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
