"""Gradients of the probe: those of training, and their cosines and norms checked by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mel_lite.lessons.internalise import DrawnBatch, LessonShare, RolloutBatch, get_internalisation
from mel_lite.run.probe.gradients import GradientProbe, ProbeBatch
from mel_lite.run.probe.measure import measure
from mel_lite.run.probe.result import WayGradient
from mel_lite.types import Status
from probes import build_probe


def flat_gradient(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The gradient of the trainer's loss on a whole generation batch as one micro-batch."""
    trainer.args.steps_per_generation, steps = 1, trainer.args.steps_per_generation
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs).backward()
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = steps
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])


def test_gradients_are_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For NLL, a divergence and new advantages: with the way minus without, on the whole batch at once."""
    trainer = build_probe(tmp_path)
    compared: dict[str, torch.Tensor] = {}

    def ways(self: Any, gradients: GradientProbe, batches: list[ProbeBatch], drawn: list[Any]) -> list[WayGradient]:
        batch = next(i for i, each in enumerate(drawn) if any(e.status is Status.KEPT for _, e in each.experiences))
        rollouts, context = batches[batch], trainer.lesson_context
        plain = flat_gradient(trainer, {**rollouts.entries})
        compared["policy"] = torch.stack([sum(gradients.policy(rollouts)), plain])
        for name, options in (("analysis", {}), ("distill", {"context": "own"}), ("credit", {"context": "own"})):
            way = get_internalisation(name, options)
            taken = DrawnBatch(drawn[batch].experiences, rollouts.groups, context, drawn[batch].pairs)
            one_by_one = sum(gradients.of_way(way, taken, rollouts))
            trainer.internalisation = way
            lessons = way.lessons(taken)
            added = way.batch_entries(taken, RolloutBatch(rollouts.rows, rollouts.entries), trainer.scorer)
            share = LessonShare(tuple(lessons), 1.0 / max(1, len(lessons)))
            whole = flat_gradient(trainer, {**rollouts.entries, **added, "lessons": share})
            compared[name] = torch.stack([one_by_one, whole - plain])
        return [WayGradient("policy loss", None)]

    monkeypatch.setattr("mel_lite.run.probe.measure._Measurement._ways", ways)
    measure(trainer, attempts=4)
    for name, (one_by_one, whole) in compared.items():
        assert whole.norm() > 1e-3, name
        assert (one_by_one - whole).norm() <= 1e-4 * whole.norm(), name
    assert len(compared) == 4


def fake_probe(reference: list[float]) -> GradientProbe:
    model = torch.nn.Linear(len(reference), 1)
    probe = GradientProbe(SimpleNamespace(model=model, args=SimpleNamespace(seed=3)))
    probe.reference_D = torch.tensor(reference)
    return probe


def test_cosines_and_norms_are_those_of_the_sums() -> None:
    grads = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    reference = [1.0, 0.5, -0.2, 0.0, 2.0]
    found = fake_probe(reference).measure(WayGradient("x", "x"), [iter(grads[:4]), iter(grads[4:])])
    expected = torch.nn.functional.cosine_similarity(grads.sum(0), torch.tensor(reference), dim=0).item()
    assert found.cosine is not None and found.cosine.value == pytest.approx(expected, abs=1e-6)
    assert found.cosine.low < found.cosine.value < found.cosine.high
    assert found.norm == pytest.approx((grads[:4].sum(0).norm() + grads[4:].sum(0).norm()).item() / 2)
    assert found.prompts == 6


def test_equal_gradients_keep_an_interval_and_none_has_no_cosine() -> None:
    same = [torch.tensor([1.0, 1.0])] * 4
    found = fake_probe([1.0, 0.0]).measure(WayGradient("x", "x"), [iter(same)])
    assert found.cosine is not None
    missed = 1 - 0.025 ** (1 / 4)
    assert [found.cosine.low, found.cosine.high] == pytest.approx([0.5**0.5 - missed, 1.0])
    nothing = fake_probe([1.0, 0.0]).measure(WayGradient("x", "x"), [iter([torch.zeros(2)] * 4)])
    assert nothing.cosine is None and nothing.norm == 0 and nothing.prompts == 0


def test_one_prompt_among_many_does_not_prove_a_direction() -> None:
    grads = [torch.zeros(2)] * 5 + [torch.tensor([1.0, 0.0])]
    found = fake_probe([1.0, 0.0]).measure(WayGradient("x", "x"), [iter(grads)])
    assert found.cosine is not None and found.cosine.value == 1.0 and found.cosine.low == 0.0
