"""The model of a decode-bound step: its arithmetic by hand, published throughputs, and the price of the schedules."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from price import decode_model
from price.decode_model import Card, Cost, Size, Workload, costs, decode_s, prefill_s, step_s


def test_the_arithmetic_by_hand() -> None:
    """10 GB of weights at 0.8 TB/s take 12.5 ms; 1000 cached tokens of 1 MB as much again per 10 of them."""
    card, model = Card("c", 1e12, 1e14), Size("m", 5e9, 10**6)
    assert step_s(card, model, 1, 0) == pytest.approx(12.5e-3)
    assert step_s(card, model, 1, 10_000) == pytest.approx(25e-3)
    assert step_s(card, model, 100, 0) == pytest.approx(20e-3), "bound by arithmetic: 100 x 10 GFLOP at 50 TFLOP/s"
    assert prefill_s(card, model, 1000) == pytest.approx(0.2)
    load = Workload(card, model)
    assert decode_s(load, [(0, 2), (0, 1)]) == pytest.approx(2 * 12.5e-3 + 1e6 / 0.8e12)
    assert decode_s(load, []) == 0.0


def test_it_is_near_every_published_throughput() -> None:
    errors = [decode_model.predicted(each) / each.tokens_per_s - 1 for each in decode_model.POINTS]
    assert len(errors) >= 7 and max(map(abs, errors)) < 0.1


def test_the_schedules_have_equal_tokens_and_overlap_hides_the_seconds() -> None:
    for load in decode_model.WORKLOADS.values():
        alone, strict, overlap = costs(load).values()
        assert strict.tokens == overlap.tokens > alone.tokens
        assert (strict.prefill_s, strict.update_s) == (overlap.prefill_s, overlap.update_s)
        assert alone.whole_s < overlap.whole_s < strict.whole_s
        assert overlap.whole_s / alone.whole_s < 1.2 < 1.4 < strict.whole_s / alone.whole_s
    target = costs(Workload())
    assert target["MEL, overlap"].whole_s / target["GRPO"].whole_s <= 1.15
    none = costs(replace(Workload(), mixed_share=0.0))
    assert none["GRPO"] == none["MEL, strict"] == none["MEL, overlap"] != Cost(0, 0, 0, 0)
