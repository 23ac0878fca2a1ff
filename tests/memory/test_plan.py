"""Plans: predictions, choices, refusals and advice; and that the presets agree with the planner."""

from __future__ import annotations

import dataclasses
import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from mel_lite.config import MELConfig
from mel_lite.errors import ConfigError
from mel_lite.memory import formulas
from mel_lite.memory.formulas import GIB, KNOWN
from mel_lite.memory.plan import BUDGETS, TARGET_SHARE, apply, plan, plan_for, shape_for
from mel_lite.memory.predict import predict
from mel_lite.memory.search import NEUTRAL
from mel_lite.memory.workload import DEFAULTS, MAX_SEQUENCES, Part, workload
from mel_lite.recipe import GPU_PRESETS, resolve
from mel_lite.training.packing import Row, deal
from plans import planned, with_vllm
from tiny_models import save_tiny


def test_defaults_are_those_of_the_config_and_the_engine() -> None:
    import inspect

    from mel_lite.engines.hf import HFEngine

    declared = {f.name: f.default for f in dataclasses.fields(MELConfig)}
    assert {key: declared[key] for key in DEFAULTS} == DEFAULTS
    assert inspect.signature(HFEngine).parameters["max_concurrent"].default == MAX_SEQUENCES


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


def test_rank_and_prompts_are_knobs_too() -> None:
    _, made, _ = plan_for("12gb", None, [("model.name", "Qwen/Qwen3-4B-Base"), ("model.engine", "hf"), ("lora.r", 512)])
    assert made is not None and not made.fits and "--set lora.r=128" in made.advice
    _, made, _ = plan_for("24gb", None, [("data.max_prompt_tokens", 30000)])
    assert made is not None and not made.fits
    advised = next(advice for advice in made.advice if "max_prompt_tokens" in advice)
    shorter = plan_for("24gb", None, [("data.max_prompt_tokens", int(advised.partition("=")[2]))])[1]
    assert shorter is not None and shorter.fits


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
