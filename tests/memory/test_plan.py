"""Plans: values and options that are refused, and that the presets agree with the planner."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from mel_lite.errors import ConfigError
from mel_lite.gpus import GPU_PRESETS
from mel_lite.memory.formulas import GIB
from mel_lite.memory.plan import BUDGETS, TARGET_SHARE, apply, plan_for, shape_for
from mel_lite.recipe import resolve
from plans import planned, with_vllm
from tiny_models import save_tiny


@pytest.mark.parametrize("gpu", sorted(BUDGETS))
def test_a_preset_is_what_the_planner_chooses_and_says_its_peak(gpu: str) -> None:
    recipe, made = planned(gpu)
    assert made.fits and made.peak_bytes <= TARGET_SHARE * BUDGETS[gpu]
    assert apply(recipe, made) == recipe
    text = resources.files("mel_lite.configs").joinpath(f"{GPU_PRESETS[gpu]}.yaml").read_text()
    header = (
        f"# Predicted peak memory, of {BUDGETS[gpu] / GIB:.1f} GiB available (`mel-lite plan --gpu {gpu}`): "
        f"{with_vllm(gpu)[1].peak} with vLLM,\n# {made.peak} with transformers. Not measured yet.\n"
    )
    assert header in text.partition("model:")[0]


def test_presets_train_what_they_promise() -> None:
    sizes = {"12gb": "Qwen3-1.7B", "16gb": "Qwen3-4B", "24gb": "Qwen3-8B", "40gb": "Qwen3-14B"}
    for gpu, size in sizes.items():
        recipe = resolve(preset=gpu)
        assert size in recipe.model.name and recipe.model.load_in_4bit
        assert recipe.train["num_generations"] == 8 and recipe.data.max_prompt_tokens == 1024
    assert resolve(preset="24gb").train["max_completion_length"] == 2048


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.num_generations", "eight", "train.num_generations='eight' must be a whole number"),
        ("train.max_completion_length", 0, "must be a whole number of at least 1"),
        ("train.per_device_train_batch_size", True, "must be a whole number"),
        ("train.num_generations", None, "train.num_generations=None must be a whole number"),
        ("train.analysis_max_tokens", None, "train.analysis_max_tokens=None must be a whole number"),
        ("data.max_prompt_tokens", -5, "data.max_prompt_tokens=-5 must be at least 1"),
        ("train.max_completion_length", 33000, "33000 leaves no room for a prompt in the model's context of 32768"),
        (
            "lora.target_modules",
            ["foo"],
            "names no linear layer of the model. Its linear layers are q_proj, .*down_proj",
        ),
    ],
)
def test_values_no_plan_can_be_made_with(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned("24gb", **{key.replace(".", "__"): value})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("lora.r", 0)], "r must be at least 1"),
        ([("train.bf16", True), ("train.fp16", True)], "training can use only one of them. Set train.bf16=false"),
        ([("model.max_seq_length", 1024)], "max_seq_length=1024 is below the [0-9]+ tokens .* Raise model.max_seq_len"),
        ([("model.max_seq_length", 2048), ("train.algorithm", "grpo")], "max_seq_length=2048 is below the 3072 tokens"),
    ],
)
def test_what_a_run_would_be_refused_for_has_no_plan(overrides: list[tuple[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_for("24gb", None, overrides)


def test_full_fine_tuning_is_not_predicted(tmp_path: Path) -> None:
    file = tmp_path / "full.yaml"
    file.write_text("lora: null\n")
    with pytest.raises(ConfigError, match="LoRA and QLoRA only"):
        plan_for("24gb", file, [])


def test_keys_of_a_file_are_pinned(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {max_micro_batch_tokens: 7000}\n")
    recipe, made, _ = plan_for("24gb", file, [("train.max_cache_tokens", 9000)])
    assert made is not None and made.choices["train.max_micro_batch_tokens"] == 7000
    assert recipe.train["max_micro_batch_tokens"] == 7000 and recipe.train["max_cache_tokens"] == 9000


def test_a_pinned_length_of_analysis_prompts_is_kept_beyond_the_planner_s_estimate() -> None:
    short = [("train.max_completion_length", 256), ("data.max_prompt_tokens", 256)]
    recipe, _, _ = plan_for("24gb", None, short)
    assert recipe.train["max_context_tokens"] == 256 + 2 * 256 + 1024, "as long as it needs with short instructions"
    recipe, _, _ = plan_for("24gb", None, [*short, ("train.max_context_tokens", 3000)])
    assert recipe.train["max_context_tokens"] == 3000
    recipe, _, _ = plan_for("24gb", None, [*short, ("train.max_context_tokens", 1_000_000)])
    assert recipe.train["max_context_tokens"] == 32_768 - recipe.train["analysis_max_tokens"], "the model's context"


def test_a_local_model_is_planned_from_its_config(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "qwen3", tied=False)
    short = [
        ("train.max_completion_length", 200),
        ("train.analysis_max_tokens", 100),
        ("train.max_context_tokens", None),
    ]
    recipe, made, _ = plan_for("12gb", None, [("model.name", str(folder)), *short])
    assert made is not None and made.fits and shape_for(recipe).vocab == 320 and shape_for(recipe).qk_norm
    assert recipe.train["max_context_tokens"] == 512 - 100, "its context"


def test_other_architectures_have_no_plan(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    recipe, made, reason = plan_for("12gb", None, [("model.name", str(folder))])
    assert made is None and recipe.model.name == str(folder) and "model_type='gpt_neox'" in reason


def test_what_an_engine_cannot_follow_is_refused_with_the_plan() -> None:
    for key, value, message in (
        ("train.beta", 0.04, "beta=0.04 with vLLM"), ("train.temperature", 2.5, "temperature=2.5: vLLM samples at 2"),
        ("train.analysis_temperature", 2.5, "train.analysis_temperature=2.5: vLLM samples at 2 at most"),
        ("eval.temperature", 3.0, "eval.temperature=3: vLLM samples at 2 at most. Lower eval.temperature"),
        ("model.max_lora_rank", 8, "max_lora_rank=8 is below the adapter's rank of 32"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            plan_for("24gb", None, [(key, value)])
        assert plan_for("24gb", None, [(key, value), ("model.engine", "hf")])[1] is not None
