"""Mixtures of experts: TRL's load-balancing loss over the rollouts, with lessons in the same forward."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from batches import micro_batch, with_lessons
from mel_lite.errors import ConfigError
from mel_lite.training import assemble
from mel_lite.types import Lesson
from tiny_models import save_tiny, set_lora
from trainers import assert_learned, build

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5,
}  # fmt: skip
LESSON = Lesson(1, tuple(range(10, 40)), tuple(range(100, 120)))


def mixture(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32))


def trainer_of(tmp_path: Path, kind: str, **options: Any) -> Any:
    if not (tmp_path / "base").exists():
        save_tiny(tmp_path / "base")
    trainer = build(tmp_path, model=mixture(kind), output_dir=tmp_path / str(len(options)), **options)
    set_lora(trainer.model, 0.2)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    return trainer


def gradients(trainer: Any, loss: torch.Tensor) -> torch.Tensor:
    trainer.model.zero_grad()
    loss.backward()
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in weights])


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("lessons", [(), (LESSON,)])
def test_the_loss_is_the_models_own_over_the_rollouts(tmp_path: Path, kind: str, lessons: tuple[Lesson, ...]) -> None:
    trainer = trainer_of(tmp_path, kind)
    assert trainer.aux_loss_enabled
    inputs = with_lessons(micro_batch(), lessons)
    with_it = trainer._compute_loss(trainer.model, inputs)
    balanced = gradients(trainer, with_it)
    trainer.aux_loss_enabled = False
    without = trainer._compute_loss(trainer.model, inputs)
    plain = gradients(trainer, without)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    own = trainer.model(input_ids=ids, attention_mask=mask, position_ids=positions, output_router_logits=True).aux_loss
    assert own.item() > 1 and (with_it - without).item() == pytest.approx(0.5 * own.item() / 2, rel=1e-4)
    expected = gradients(trainer, 0.5 * own / 2)
    assert expected.norm() > 1e-4
    assert (balanced - plain - expected).norm() <= 1e-3 * expected.norm()


def test_a_token_budget_does_not_change_it(tmp_path: Path) -> None:
    inputs = with_lessons(micro_batch(), (LESSON,))
    trainer = trainer_of(tmp_path, "qwen3_moe")
    expected = gradients(trainer, trainer._compute_loss(trainer.model, inputs))
    trainer.model.zero_grad()
    trainer.args.max_micro_batch_tokens = 20
    trainer.compute_loss(trainer.model, inputs)
    got = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_a_mixture_trains_under_default_options_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, assemble.__name__):
        trainer = trainer_of(tmp_path, "qwen3_moe", max_steps=2)
    assert caplog.text.count("the load-balancing loss is over the rollouts; lessons do not count in it") == 1
    set_lora(trainer.model, 0.0)
    trainer.train()
    assert_learned(trainer)
    assert trainer.store.list(status="kept")
    assert all(0 < log["aux_loss"] < 10 for log in trainer.state.log_history if "aux_loss" in log)
    assert any("aux_loss" in log for log in trainer.state.log_history)


def test_what_cannot_be_balanced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="skip_zero_advantage=True with router_aux_loss_coef=0.5"):
        trainer_of(tmp_path, "qwen3_moe", skip_zero_advantage=True)
    monkeypatch.setattr(assemble, "balances_experts", lambda model: False)
    with pytest.raises(ConfigError, match="loss of Qwen3MoeForCausalLM is not known. Set router_aux_loss_coef=0"):
        trainer_of(tmp_path, "qwen3_moe")
