"""Predicted peaks of the phases of a step: their parts, their order, and what they grow with."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from mel_lite.memory import formulas
from mel_lite.memory.formulas import KNOWN
from mel_lite.memory.plan import shape_for
from mel_lite.memory.predict import predict
from mel_lite.memory.workload import Part, workload
from mel_lite.recipe import resolve
from mel_lite.training.batches.packing import Row, deal
from plans import planned


def test_parts_add_up_and_phases_come_in_order() -> None:
    _, made = planned("24gb")
    names = ["load", "rollout", "analysis", "replay", "scoring", "update", "optimizer", "export"]
    assert [phase.name for phase in made.phases] == names
    for phase in made.phases:
        assert sum(phase.parts.values()) == phase.bytes and min(phase.parts.values()) >= 0
    weights = formulas.weight_bytes(KNOWN["Qwen/Qwen3-8B"], four_bit=True)
    assert {phase.parts["weights"] for phase in made.phases[:-1]} == {weights}
    sixteen_bit = formulas.weight_bytes(KNOWN["Qwen/Qwen3-8B"], four_bit=False)
    assert sixteen_bit < made.phases[-1].parts["weights"] < 1.05 * sixteen_bit, "the trained model is given up first"
    assert made.peak_bytes == max(phase.bytes for phase in made.phases[:-1])


def test_grpo_alone_has_no_lessons() -> None:
    _, made = planned("24gb", train__algorithm="grpo")
    assert [phase.name for phase in made.phases] == ["load", "rollout", "update", "optimizer", "export"]
    whole = [("train.max_micro_batch_tokens", None), ("train.per_device_train_batch_size", 4)]
    recipes = (resolve(preset="24gb", overrides=[*whole, ("train.algorithm", name)]) for name in ("mel", "grpo"))
    mel, without = (
        {phase.name: phase.bytes for phase in predict(workload(recipe, KNOWN["Qwen/Qwen3-8B"]))} for recipe in recipes
    )
    lesson_bytes = 36 * 2 * 4096 * (5120 + 1024)  # one hidden state per layer, for the one lesson of the micro-batch
    assert mel["update"] - without["update"] > lesson_bytes


def test_no_part_of_a_micro_batch_takes_more_than_predicted() -> None:
    """Rows of random lengths up to their limits, divided into parts by the trainer's own function."""
    draw, recipe = random.Random(5), resolve(preset="24gb")
    load = workload(recipe, KNOWN["Qwen/Qwen3-8B"])
    options: dict[str, Any] = {"checkpointing": True, "four_bit": True, "measured": True}

    def bytes_of(part: Part) -> int:
        return formulas.update_bytes(load.shape, part.lengths, part.scored_tokens, **options)

    worst, seen = max(map(bytes_of, load.fullest_parts)), 0
    for _ in range(60):
        longest = draw.randint(40, load.completion_tokens)
        scored = [draw.randint(max(1, longest // draw.randint(1, 4)), longest) for _ in range(64)]
        rows = [Row(torch.empty(draw.randint(1, 1024) + n, device="meta"), n) for n in scored]
        for _ in range(draw.randint(0, 8)):
            written = draw.randint(20, load.analysis_tokens)
            rows.append(Row(torch.empty(draw.randint(300, load.context_tokens) + written, device="meta"), written))
        for part in deal(rows, load.max_micro_batch_tokens):
            chosen = [rows[i] for i in part]
            taken = Part(tuple((len(row.ids), row.scored_tokens) for row in chosen))
            seen = max(seen, bytes_of(taken))
            assert bytes_of(taken) <= 1.02 * worst, (taken, worst)
    assert seen > 0.9 * worst, "the prediction is far from what happens"


def test_memory_grows_with_everything_that_takes_it() -> None:
    base = resolve(
        preset="24gb", overrides=[("train.max_micro_batch_tokens", None), ("train.per_device_train_batch_size", 4)]
    )
    shape = shape_for(base)

    def update(**train: Any) -> int:
        recipe = dataclasses.replace(base, train={**base.train, **train})
        return next(phase.bytes for phase in predict(workload(recipe, shape)) if phase.name == "update")

    for key, value in {
        "per_device_train_batch_size": 5, "max_completion_length": 2049, "max_context_tokens": 5121,
        "analysis_max_tokens": 1025, "gradient_checkpointing": False, "optim": "adamw_torch",
    }.items():  # fmt: skip
        assert update(**{key: value}) > update(), key
    assert update(grad_norm_every=0) < update()
    assert update(max_micro_batch_tokens=10_000) < update(max_micro_batch_tokens=11_000) < update()
    assert update(max_micro_batch_tokens=8000, per_device_train_batch_size=64) == update(max_micro_batch_tokens=8000)


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce++", "rft"])
def test_lessons_are_planned_for_with_every_estimator(algorithm: str) -> None:
    peaks = {}
    for name, options in (
        ("mel", []),
        ("with", [("train.algorithm", algorithm), ("train.meta_experience", True)]),
        ("without", [("train.algorithm", algorithm)]),
    ):
        recipe = resolve(preset="24gb", overrides=[("train.max_micro_batch_tokens", None), *options])
        phases = predict(workload(recipe, shape_for(recipe)))
        peaks[name] = {phase.name: phase.bytes for phase in phases}
    assert peaks["with"] == peaks["mel"] and "analysis" in peaks["with"]
    assert "analysis" not in peaks["without"] and peaks["without"]["update"] < peaks["mel"]["update"]


@pytest.mark.parametrize(
    ("options", "held", "kept"),
    [({"form": "sampled"}, 0, 0), ({"context": "sibling"}, 1, 1), ({"context": "bank", "mask": "shift"}, 2, 1)],
)
def test_teachers_hidden_states_are_planned_for(options: dict[str, Any], held: int, kept: int) -> None:
    """One hidden state of a batch is completions x C x H x e bytes."""
    peaks = {}
    for way, chosen in (("analysis", None), ("distill", options)):
        overrides = [("train.internalisation", way), ("train.internalisation_options", chosen)]
        recipe = resolve(preset="24gb", overrides=[*overrides, ("train.max_completion_length", 2048)])
        load = workload(recipe, shape_for(recipe))
        peaks[way] = {phase.name: phase for phase in predict(load)}
    state = load.completions * 2048 * load.shape.hidden * 2
    assert peaks["distill"]["update"].parts["teachers"] == kept * state
    assert peaks["analysis"]["update"].parts["teachers"] == 0
    scored = peaks["distill"]["scoring"].parts["activations"]
    assert scored >= (held + 1) * state if held else scored == peaks["analysis"]["scoring"].parts["activations"]
