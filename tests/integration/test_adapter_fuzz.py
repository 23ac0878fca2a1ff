"""Any adapter that PEFT can build takes a step that changes it alone, or is refused in words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainers
from mel_lite import MELConfig, MELTrainer
from mel_lite.errors import MelLiteError
from mel_lite.models.adapters import attach_adapter
from mel_lite.models.load import ModelSpec, load_base
from tiny_models import save_tiny

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OTHERS: dict[str, Any] = {
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "vera": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "ln_tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, target_r=2, total_step=9, tinit=1, tfinal=1, target_modules=LAYERS),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 9], task_type="CAUSAL_LM"),
    "prompt_tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "poly": lambda: peft.PolyConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


def random_lora(rng: random.Random) -> peft.LoraConfig:
    options: dict[str, Any] = {
        "r": rng.choice([1, 4]),
        "lora_alpha": rng.choice([1, 16]),
        "lora_dropout": rng.choice([0.0, 0.0, 0.3]),
        "bias": rng.choice(["none", "none", "all", "lora_only"]),
        "target_modules": rng.choice(
            ["all-linear", [rng.choice(LAYERS)], ["embed_tokens", "q_proj"], ["lm_head"], "x"]
        ),
        "init_lora_weights": rng.choice([True, False, "gaussian", "orthogonal", "pissa", "olora"]),
        "use_rslora": rng.random() < 0.3,
        "use_dora": rng.random() < 0.3,
        "task_type": "CAUSAL_LM",
    }
    extra: list[dict[str, Any]] = [
        {}, {}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "norm"]},
        {"trainable_token_indices": [5, 9]}, {"trainable_token_indices": [5000]}, {"layers_to_transform": [1]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {"rank_pattern": {"q_proj": 2}},
        {"inference_mode": True}, {"layer_replication": [(0, 1), (0, 2)]},
    ]  # fmt: skip
    return peft.LoraConfig(**options, **rng.choice(extra))


def one_step(base: Path, output: Path, config: Any) -> MELTrainer:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "num_generations": 4, "max_steps": 1,
        "per_device_train_batch_size": 4, "max_completion_length": 3, "save_steps": 1, "learning_rate": 1e-2,
        "report_to": "none", "disable_tqdm": True, "seed": 7, "algorithm": "grpo", "probe_max_diff": None,
        "verifier_threshold": 0.5,
    }  # fmt: skip
    return MELTrainer(
        model,
        reward_funcs=trainers.even_ids,
        args=MELConfig(str(output), **options),
        train_dataset=trainers.sums(4).remove_columns("answer"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config,
    )


def outcome(base: Path, output: Path, config: Any) -> str:
    """Return "step" or "refused"; anything else raises. A step changes adapter weights and no others."""
    try:
        trainer = one_step(base, output, config)
    except MelLiteError as error:
        assert len(str(error)) > 40, error
        return "refused"
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    trainer.train()
    changed = {name for name, w in trainer.model.named_parameters() if not torch.equal(before[name], w)}
    assert changed
    assert changed <= trained
    return "step"


@pytest.mark.parametrize("seed", range(12))
def test_a_random_lora_takes_a_step_or_is_refused(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    base = save_tiny(tmp_path / "base", tied=rng.random() < 0.5)
    config = random_lora(rng)
    try:
        done = outcome(base, tmp_path / "run", config)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} from {config}") from error
    if done == "step" and config.init_lora_weights is not False:
        loaded = attach_adapter(load_base(ModelSpec(str(base))), tmp_path / "run" / "checkpoint-1")
        assert {"lora_B" in name for name, _ in loaded.named_parameters()} == {True, False}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_take_a_step_or_are_refused(tmp_path: Path, kind: str) -> None:
    done = outcome(save_tiny(tmp_path / "base"), tmp_path / "run", OTHERS[kind]())
    assert done == ("refused" if kind in ("tokens", "prompt_tuning", "prefix_tuning", "poly") else "step")
