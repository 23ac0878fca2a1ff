"""The workload of a recipe: the sizes a plan is made for."""

from __future__ import annotations

import dataclasses

import pytest

from mel_lite.config import MELConfig
from mel_lite.errors import ConfigError
from mel_lite.memory.formulas import KNOWN
from mel_lite.memory.plan import plan_for, shape_for
from mel_lite.memory.workload import DEFAULTS, MAX_SEQUENCES, workload
from mel_lite.recipe import resolve


def test_defaults_are_those_of_the_config_and_the_engine() -> None:
    import inspect

    from mel_lite.engines.hf import HFEngine

    declared = {f.name: f.default for f in dataclasses.fields(MELConfig)}
    assert {key: declared[key] for key in DEFAULTS} == DEFAULTS
    assert inspect.signature(HFEngine).parameters["max_concurrent"].default == MAX_SEQUENCES


def test_an_open_analysis_context_takes_what_a_bound_on_sequences_leaves() -> None:
    bounded = [("model.max_seq_length", 5000), ("train.max_context_tokens", None)]
    recipe, made, _ = plan_for("24gb", None, bounded)
    assert made is not None and made.fits and recipe.train["max_context_tokens"] == 5000 - 1024
    assert plan_for("24gb", None, [("model.max_seq_length", 1024), ("model.engine", "hf")])[1], "it is not for hf"


def test_prompts_leave_room_for_the_completion() -> None:
    """A run drops longer prompts."""
    recipe = resolve(preset="24gb", overrides=[("train.max_completion_length", 32000)])
    assert workload(recipe, shape_for(recipe)).rollout_tokens == 32768
    written = dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, target_modules=["self_attn.q_proj"]))
    assert len(workload(written, shape_for(recipe)).lora) == 2 * 36, "names as PEFT takes them"


def test_memory_is_reserved_for_every_text_of_a_meta_experience() -> None:
    whole = [("train.max_micro_batch_tokens", None), ("train.per_device_train_batch_size", 64),
             ("train.gradient_accumulation_steps", 1)]  # fmt: skip
    loads = {
        name: workload(
            resolve(preset="24gb", overrides=[*whole, ("train.internalisation", name)]), KNOWN["Qwen/Qwen3-8B"]
        )
        for name in ("analysis", "both")
    }
    assert loads["both"].lessons_per_micro_batch == 2 * loads["analysis"].lessons_per_micro_batch == 2 * 8
    with pytest.raises(ConfigError, match="internalisation='bth' is not one of .* Did you mean 'both'"):
        plan_for("24gb", None, [("train.internalisation", "bth")])


def test_the_overlapped_schedule_samples_everything_in_one_call() -> None:
    strict, overlap = (
        workload(resolve(preset="24gb", overrides=[("train.mel_schedule", name)]), KNOWN["Qwen/Qwen3-8B"])
        for name in ("strict", "overlap")
    )
    kinds = strict.sampled
    assert list(kinds) == ["rollout", "analysis", "replay"] and list(overlap.sampled) == ["rollout"]
    assert overlap.sampled["rollout"] == tuple(
        combine(each[i] for each in kinds.values()) for i, combine in enumerate((sum, max, max))
    )
    assert overlap.longest_sampled == strict.longest_sampled
    plain = resolve(preset="24gb", overrides=[("train.mel_schedule", "overlap"), ("train.algorithm", "grpo")])
    assert workload(plain, KNOWN["Qwen/Qwen3-8B"]).sampled == {"rollout": kinds["rollout"]}
