"""Token credit against full logits, its bounds, and strength 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise import get_internalisation
from mel_lite.text import common_prefix_tokens
from mel_lite.types import Verdict
from scripted import ScriptedEngine
from teaching import Caught, Rules, catch, note_of, shuffled_note, varied
from tiny_models import save_tiny
from trainers import assert_learned, build, digest, trainable


def expected_factors(caught: Caught, options: dict[str, Any], lam: float) -> dict[int, torch.Tensor]:
    """The factor (T,) of each credited row, from full logits."""
    factors = {}
    for row, (group, rollout) in enumerate(caught.rows):
        note = note_of(caught, row, context=options["context"], per_prompt="all")
        if note is None or (rollout.verdict is Verdict.RIGHT and options.get("rows", "wrong") == "wrong"):
            continue
        control = shuffled_note(caught, row, context=options["context"], per_prompt="all")
        with torch.no_grad():
            evidence_T = (caught.picked(row, note) - caught.picked(row, control)) / options.get("tau_nats", 1.0)
        sign = 1 if rollout.verdict is Verdict.RIGHT else -1
        factor_T = (1 + lam * options.get("strength", 0.5) * sign * evidence_T.tanh()).clamp(0.1, 2.0)
        if options.get("from_fork", True):
            rivals = group.right if rollout.verdict is Verdict.WRONG else group.wrong
            shared = [common_prefix_tokens(rollout.completion_ids, each.completion_ids) for each in rivals]
            factor_T[: max(shared, default=0)] = 1.0
        factors[row] = factor_T
    return factors


CASES: dict[str, dict[str, Any]] = {
    "own lessons": {"context": "own"},
    "a bank, all rows": {"context": "bank", "rows": "all", "from_fork": False, "tau_nats": 3.0},
    "a sibling, reversed": {"context": "sibling", "rows": "all", "strength": -0.7},
}


@pytest.mark.parametrize("case", CASES)
def test_advantages_are_scaled_by_what_the_lesson_says_of_each_token(tmp_path: Path, case: str) -> None:
    options = CASES[case]
    bank = Rules() if options["context"] == "bank" else None
    caught = catch(tmp_path, bank=bank, analysis=varied, internalisation="credit", internalisation_options=options)
    expected_BC = caught.before["advantages"][:, None].repeat(1, caught.before["completion_ids"].shape[1])
    factors = expected_factors(caught, options, 0.3)
    for row, factor_T in factors.items():
        expected_BC[row, : len(factor_T)] *= factor_T.float()
    assert torch.allclose(caught.after["advantages"], expected_BC, atol=1e-4)
    moved = [(factor_T - 1).abs().mean().item() for factor_T in factors.values()]
    assert max(moved) > 0.01
    logged = {name: values[-1] for name, values in caught.logged.items() if "credit" in name}
    assert logged == pytest.approx(
        {"mel/credited_rows": len(moved), "mel/credit_over_context": 0, "mel/credit_moved": sum(moved) / len(moved)},
        rel=1e-3,
    )


def test_the_factor_is_bounded_and_the_sign_never_flips(tmp_path: Path) -> None:
    options = {"context": "sibling", "rows": "all", "strength": 1.0, "tau_nats": 0.01, "from_fork": False}
    caught = catch(tmp_path, mel_weight=5.0, internalisation="credit", internalisation_options=options)
    before_B, after_BC = caught.before["advantages"], caught.after["advantages"]
    moves = before_B != 0
    factors = (after_BC / before_B[:, None])[moves]
    assert factors.min() == pytest.approx(0.1) and factors.max() == pytest.approx(2.0)
    assert (after_BC.sign() == before_B.sign()[:, None]).all()


@pytest.mark.slow
def test_without_strength_it_is_grpo_bit_for_bit(tmp_path: Path) -> None:
    weights = {}
    shared: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    for name, options in {
        "grpo": {"algorithm": "grpo"},
        "strength 0": {"internalisation": "credit", "internalisation_options": {"strength": 0}},
        "lambda 0": {"internalisation": "credit", "mel_weight": 0.0},
        "half": {"internalisation": "credit"},
    }.items():
        save_tiny(tmp_path / "base")
        engine = ScriptedEngine(AutoTokenizer.from_pretrained(tmp_path / "base"), analysis=varied)
        trainer = build(tmp_path, engine=engine, output_dir=tmp_path / name, **shared, **options)
        trainer.train()
        assert_learned(trainer)
        weights[name] = digest(trainable(trainer))
    assert weights["grpo"] == weights["strength 0"] == weights["lambda 0"] != weights["half"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "none"}, "internalisation_options.context='none' is not one of own, bank, sibling"),
        ({"strength": 1.5}, r"internalisation_options.strength=1.5 must be a number in \[-1, 1\]"),
        ({"tau_nats": 0.0}, "internalisation_options.tau_nats=0.0 must be a number above 0"),
        ({"rows": "right"}, "internalisation_options.rows='right' is not one of all, wrong"),
        ({"from_fork": 1}, "internalisation_options.from_fork=1 is a int. Set it to true or false"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_internalisation("credit", options)
