"""The mass that top_k, top_p and min_p cut, against all logits of the same positions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mel_lite.engines.hf import HFEngine
from tiny_models import set_lora
from trainers import build, even_ids, tiny_model

WARPERS = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}


def one_step(tmp_path: Path, **options: Any) -> tuple[Any, dict[str, Any], list[Any]]:
    """Train one step at learning rate 0 on what the model itself samples; return trainer, log and micro-batches."""
    model = tiny_model(tmp_path / "base")
    defaults = {"algorithm": "grpo", "learning_rate": 0.0, "max_steps": 1, "reward_funcs": even_ids, "verifier": None}
    engine = HFEngine(model, eos_ids=[2], pad_id=0)
    trainer = build(tmp_path, model=model, engine=engine, **(defaults | options))
    set_lora(trainer.model, 0.2)
    original, seen = trainer._compute_loss, []

    def spy(model: Any, inputs: Any) -> Any:
        seen.append(inputs)
        return original(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    log = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    return trainer, log, seen


def cut_by_hand(trainer: Any, inputs: Any, option: str, value: float, temperature: float) -> list[float]:
    """The probability outside of what `option` keeps, for each completion token, from all logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
    cut = []
    with torch.no_grad():
        for row, kept in zip(ids, mask, strict=True):
            text = row[kept][None]
            scored = int(kept[inputs["prompt_ids"].shape[1] :].sum())
            logits = trainer.model(text).logits[0, :-1][-scored:].double() / temperature
            warped = WARPERS[option](value)(None, logits)
            cut += (logits.softmax(-1) * warped.isneginf()).sum(-1).tolist()
    return cut


@pytest.mark.parametrize(
    ("option", "value", "temperature"),
    [("top_k", 5, 1.0), ("top_p", 0.8, 1.0), ("top_p", 0.7, 1.4), ("min_p", 0.1, 1.0)],
)
def test_the_logged_mass_is_what_the_option_cuts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, option: str, value: float, temperature: float
) -> None:
    with caplog.at_level(logging.WARNING, "mel_lite.training.cut_mass"):
        trainer, log, seen = one_step(tmp_path, temperature=temperature, **{option: value})
    (inputs,) = seen
    cut = cut_by_hand(trainer, inputs, option, value, temperature)
    assert len(cut) == int(inputs["completion_mask"].sum()) > 60 and 0.02 < max(cut) < 1
    assert log["mel/cut_mass"] == pytest.approx(sum(cut) / len(cut), abs=2e-5)
    expected = -torch.log1p(-torch.tensor(cut, dtype=torch.float64)).mean().item()
    assert log["mel/sampling_kl"] == pytest.approx(expected, abs=2e-5)
    assert f"{option}={value} cut {log['mel/cut_mass']:.1%} of the policy's probability" in caplog.text


@pytest.mark.slow
def test_parts_and_accumulation_measure_the_same_mass(tmp_path: Path) -> None:
    for name, options in (
        ("parts", {"max_micro_batch_tokens": 64}),
        ("micro", {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_micro_batch_tokens": 1}),
    ):
        trainer, log, seen = one_step(tmp_path / name, top_k=5, **options)
        assert len(seen) > 1, "the micro-batch was taken in parts"
        cut = [mass for inputs in seen for mass in cut_by_hand(trainer, inputs, "top_k", 5, 1.0)]
        assert log["mel/cut_mass"] == pytest.approx(sum(cut) / len(cut), abs=2e-5) and max(cut) > 0.02


def test_a_repetition_penalty_changes_the_distribution_and_cuts_nothing(tmp_path: Path) -> None:
    _, log, _ = one_step(tmp_path, repetition_penalty=1.5, max_completion_length=64)
    assert log["mel/sampling_kl"] > 0.1 and "mel/cut_mass" not in log


@pytest.mark.parametrize("options", [{}, {"top_k": 0, "top_p": 1.0}, {"top_k": 5, "algorithm": "rft"}])
def test_nothing_is_measured_where_nothing_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    with caplog.at_level(logging.WARNING, "mel_lite.training.cut_mass"):
        _, log, _ = one_step(tmp_path, **options)
    assert "mel/policy_loss" in log and not {"mel/cut_mass", "mel/sampling_kl"} & log.keys()
    assert "the policy's probability" not in caplog.text
