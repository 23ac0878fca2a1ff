"""The search for settings that fit: what gives way, in which order, and advice where nothing does."""

from __future__ import annotations

import dataclasses
from importlib import resources
from typing import Any

from mel_lite.memory.plan import BUDGETS, TARGET_SHARE, apply, plan, plan_for, shape_for
from mel_lite.memory.search import NEUTRAL
from plans import planned


def test_qwen3_14b_fits_24_gb_by_giving_up_concurrency() -> None:
    _, eight = planned("24gb")
    _, fourteen = planned("24gb", model__name="Qwen/Qwen3-14B-Base")
    assert fourteen.fits
    assert fourteen.choices["train.max_cache_tokens"] < eight.choices["train.max_cache_tokens"]
    assert fourteen.choices["train.max_micro_batch_tokens"] < eight.choices["train.max_micro_batch_tokens"]
    said = resources.files("mel_lite.configs").joinpath("gpu-24gb.yaml").read_text()
    for key in ("max_micro_batch_tokens", "max_cache_tokens"):
        assert f"{key} {fourteen.choices[f'train.{key}']}" in said
    kept = [key for key in eight.choices if key not in NEUTRAL]
    assert {key: eight.choices[key] for key in kept} == {key: fourteen.choices[key] for key in kept}


def test_completions_per_step_stay_what_they_were() -> None:
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-14B"):
        recipe, made = planned("24gb", model__name=name)
        chosen = apply(recipe, made).train
        assert chosen["per_device_train_batch_size"] * chosen["gradient_accumulation_steps"] == 64
        assert chosen["max_micro_batch_tokens"] >= 5120 + 1024, "the longest row, at least"


def test_what_does_not_fit_is_refused_with_changes_that_help() -> None:
    pinned = ("train.max_micro_batch_tokens",)
    recipe, made = planned("24gb", pinned=pinned, train__max_micro_batch_tokens=23552)
    assert not made.fits and "does not fit 24gb: the update phase needs" in made.refusal()
    assert made.advice[0] == "--set train.max_micro_batch_tokens=16384"
    tried = 0
    for advice in made.advice:
        changes = [word.split("=") for word in advice.split() if word.startswith(("train.", "model.load"))]
        if not changes:
            continue
        tried += 1
        values = {key.partition(".")[2]: int(value) for key, value in changes}
        advised = dataclasses.replace(recipe, train={**recipe.train, **values})
        assert plan(advised, shape_for(recipe), gpu="24gb", budget_bytes=BUDGETS["24gb"], pinned=pinned).fits, advice
    assert tried >= 2


def test_advice_names_a_smaller_model_of_the_family() -> None:
    _, wide = planned("12gb", model__name="Qwen/Qwen3-14B-Base", model__load_in_4bit=False)
    assert not wide.fits and "--set model.load_in_4bit=true" not in wide.advice
    assert wide.advice[-1].startswith("--model Qwen/Qwen3-") and wide.advice[-1].endswith("-Base")
    _, close = planned("16gb", model__name="Qwen/Qwen3-14B-Base", train__max_completion_length=256)
    assert "--set train.grad_norm_every=0" in close.advice, "a metric may be all that is too much"


def test_settings_give_way_in_order() -> None:
    """First the micro-batch, then checkpointing and 8-bit moments, then an unset length of C_retro."""
    overrides = {
        "train__gradient_checkpointing": False,
        "train__optim": "adamw_torch",
        "train__max_context_tokens": None,
    }
    _, roomy = planned("80gb", model__name="Qwen/Qwen3-0.6B", **overrides)
    assert roomy.choices["train.gradient_checkpointing"] is False and roomy.choices["train.optim"] == "adamw_torch"
    assert roomy.choices["train.max_context_tokens"] == 1024 + 2 * 2048 + 1024
    _, tight = planned("24gb", **overrides)
    assert tight.fits and tight.choices["train.gradient_checkpointing"] is True
    long = {**overrides, "train__max_completion_length": 8000}
    _, long_plan = planned("24gb", model__name="Qwen/Qwen3-14B", **long)
    assert long_plan.fits and 1536 <= long_plan.choices["train.max_context_tokens"] < 2 * 8000
    assert long_plan.choices["train.max_micro_batch_tokens"] < 2 * (1024 + 8000)


def test_a_pinned_setting_is_kept() -> None:
    _, made = planned("80gb", pinned=("train.max_cache_tokens",), train__max_cache_tokens=7000)
    assert made.choices["train.max_cache_tokens"] == 7000
    _, made = planned("80gb", pinned=("train.optim",), train__optim="adamw_torch")
    assert made.choices["train.optim"] == "adamw_torch"


def test_a_plan_close_to_the_budget_still_fits() -> None:
    recipe, made = planned("24gb", pinned=NEUTRAL)
    tight = int(made.peak_bytes / (TARGET_SHARE + 0.02))
    assert plan(recipe, shape_for(recipe), gpu="24gb", budget_bytes=tight, pinned=NEUTRAL).fits
    assert not plan(recipe, shape_for(recipe), gpu="24gb", budget_bytes=made.peak_bytes - 1, pinned=NEUTRAL).fits


def test_rank_and_prompts_are_knobs_too() -> None:
    _, made, _ = plan_for("12gb", None, [("model.name", "Qwen/Qwen3-4B-Base"), ("model.engine", "hf"), ("lora.r", 512)])
    assert made is not None and not made.fits and "--set lora.r=128" in made.advice
    _, made, _ = plan_for("24gb", None, [("data.max_prompt_tokens", 30000)])
    assert made is not None and not made.fits
    advised = next(advice for advice in made.advice if "max_prompt_tokens" in advice)
    shorter = plan_for("24gb", None, [("data.max_prompt_tokens", int(advised.partition("=")[2]))])[1]
    assert shorter is not None and shorter.fits


def test_groups_are_halved_where_nothing_else_fits() -> None:
    """Scoring for a KL term holds the hidden states of all completions of a step."""
    large: dict[str, Any] = {"train__beta": 0.04, "train__per_device_train_batch_size": 512}
    recipe, made = planned("24gb", **large)
    assert made.fits and made.choices["train.num_generations"] == 4
    assert made.choices["train.per_device_train_batch_size"] == 256, "as many prompts as before"
    assert any("groups have 4 completions instead of 8: nothing else fits" in note for note in made.notes)
    chosen = apply(recipe, made).train
    assert (chosen["num_generations"], chosen["per_device_train_batch_size"]) == (4, 256)
    _, whole = planned("24gb", **{**large, "train__per_device_train_batch_size": 384})
    assert whole.fits and whole.choices["train.num_generations"] == 8, "groups shrink only when the card is full"
    assert whole.peak_bytes > TARGET_SHARE * BUDGETS["24gb"]
    for pinned in ("train.num_generations", "train.per_device_train_batch_size"):
        _, refused = planned("24gb", pinned=(pinned,), **large)
        assert not refused.fits and refused.choices["train.num_generations"] == 8
    _, never = planned("24gb", train__beta=0.04, train__per_device_train_batch_size=2048)
    assert not never.fits and not any("groups have" in note for note in never.notes)
