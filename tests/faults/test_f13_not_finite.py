"""F13: a NaN or Inf in a loss, one gradient, the logits, the stale log-probs or a lesson never reaches the weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from mel_lite.errors import DivergedError
from mel_lite.resilience import nonfinite
from trainers import assert_learned, build, run_state, step_log

NAN, INF = float("nan"), float("inf")


class States(TrainerCallback):
    """Records H(S) after every step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: list[dict[str, str]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = run_state(self.trainer)
        self.seen.append({part: kept[part] for part in ("weights", "moments", "scheduler")})


def poison(trainer: Any, where: str, steps: set[int]) -> None:
    """Put one non-finite value into the computation of the given steps (0 is the first)."""
    original = trainer._compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if trainer.state.global_step not in steps or not trainer.model.training:
            return original(model, inputs)
        if where == "loss":
            return original(model, inputs) + NAN
        if where == "stale log-probs":
            old = inputs["completion_mask"].float() * -1.0
            old[0, 0] = NAN
            inputs["old_per_token_logps"] = old  # in place: the guard keeps the batch by reference
            return original(model, inputs)
        if where == "lesson":
            scores = trainer._get_per_token_logps_and_entropies

            def spoilt(forward: Any, *args: Any, **kwargs: Any) -> Any:
                result = scores(forward, *args, **kwargs)
                assert forward.lesson_logps, "the micro-batch has no lesson"
                forward.lesson_logps = tuple(logp_T * NAN for logp_T in forward.lesson_logps)
                return result

            trainer._get_per_token_logps_and_entropies = spoilt
            try:
                return original(model, inputs)
            finally:
                trainer._get_per_token_logps_and_entropies = scores
        if where == "logits":
            norm = trainer.model.get_base_model().model.norm

            def one_nan(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                mask = torch.zeros_like(output)
                mask[0, -2, 0] = NAN
                return output + mask

            handle = norm.register_forward_hook(one_nan)
            try:
                return original(model, inputs)
            finally:
                handle.remove()
        loss = original(model, inputs)
        weight = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)

        def one_inf(grad: torch.Tensor) -> torch.Tensor:
            handle.remove()
            grad = grad.clone()
            grad[0, 0] = INF
            return grad

        handle = weight.register_hook(one_inf)
        return loss

    trainer._compute_loss = compute_loss


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradient", "logits", "stale log-probs", "lesson"])
def test_the_step_is_skipped_and_its_batch_recorded(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    states = States()
    trainer = build(tmp_path, max_steps=4, callbacks=[states], grad_norm_every=1, max_grad_norm=0.1)
    states.trainer = trainer
    poison(trainer, where, {1})
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.nonfinite"):
        trainer.train()
    first, skipped, third, _ = states.seen
    assert skipped == first, "H(S) is as before the step"
    assert all(third[part] != first[part] for part in third), "the run continues"
    assert_learned(trainer)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert trainer.nonfinite.skipped_steps == 1 and caplog.text.count("Step 2 was skipped") == 1

    dumped = tmp_path / "run" / nonfinite.BAD_STEPS
    assert [path.name for path in dumped.iterdir()] == ["step-2"]
    record = json.loads((dumped / "step-2" / "batch.json").read_text())
    tensors = load_file(dumped / "step-2" / "batch.safetensors")
    assert tensors["0.completion_ids"].shape[0] == 8
    assert ("nan" in record["losses"][0] or "inf" in record["losses"][0]) == (where != "gradient")
    assert record["not_finite"] == (["0.old_per_token_logps"] if where == "stale log-probs" else [])
    assert step_log(tmp_path / "run")[1]["mel/skipped"] == 1
    nlls = [row.nll_before for row in trainer.store.list(step=2)]
    assert nlls and all(nll is None for nll in nlls), "the lessons of a skipped step were not trained"


def test_three_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=9, save_strategy="steps", save_steps=1)
    poison(trainer, "loss", {2, 3, 4})
    with pytest.raises(DivergedError, match="3 steps in a row were not finite at step 5") as error:
        trainer.train()
    # The skipped steps were also saved, with the weights of step 2.
    assert f"last good checkpoint is {tmp_path / 'run' / 'checkpoint-4'}" in str(error.value)
    assert error.value.exit_code == 5
    saved = [load_file(tmp_path / "run" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in (2, 4)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert_learned(trainer)


def test_two_in_a_row_do_not(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=6)
    poison(trainer, "loss", {0, 1, 3, 4})
    trainer.train()
    assert trainer.nonfinite.skipped_steps == 4
    assert_learned(trainer)


def test_a_full_disk_does_not_turn_a_skipped_step_into_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nonfinite, "save_file", full)
    trainer = build(tmp_path, max_steps=2)
    poison(trainer, "loss", {0})
    trainer.train()
    assert trainer.nonfinite.skipped_steps == 1
    assert_learned(trainer)
