"""A recipe's model and engine are loaded as chosen; what Unsloth is asked for, and its errors."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

import fake_unsloth
from mel_lite.engines.choice import BNB_PLUGIN, Machine
from mel_lite.engines.unsloth import KEEP_UTILIZATION, STANDBY
from mel_lite.errors import ConfigError, EngineError
from mel_lite.recipe import build_args, resolve
from mel_lite.run import load_model
from tiny_models import save_tiny

ALL = frozenset({"unsloth", "vllm", BNB_PLUGIN})

GPU = Machine((8, 9), ALL)

CPU = Machine(None, ALL)

SHORT = {"train.max_completion_length": 20, "data.max_prompt_tokens": 10, "train.max_context_tokens": 100,
         "train.analysis_max_tokens": 30, "eval.max_new_tokens": None}  # fmt: skip


def recipe_for(folder: Path, **overrides: Any) -> Any:
    options = {"model.name": str(folder), "lora.start_from": None, "lora.r": 4, "train.max_steps": 1}
    return resolve(preset="cpu", overrides=[*(options | overrides).items()])


def loaded(folder: Path, **overrides: Any) -> tuple[Any, Any, str]:
    recipe = recipe_for(folder, **overrides)
    console = Console(record=True, width=200, file=(folder.parent / "shown").open("w"))
    model, peft_config = load_model.load_for_training(recipe, build_args(recipe, folder.parent / "run"), console)
    return model, peft_config, console.export_text()


def test_auto_falls_back_when_unsloth_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package raises on import, like Unsloth when something that it patches is missing."""
    folder = save_tiny(tmp_path / "base")
    (tmp_path / "site" / "unsloth").mkdir(parents=True)
    (tmp_path / "site" / "unsloth" / "__init__.py").write_text("raise NotImplementedError('no accelerator')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(load_model, "this_machine", lambda processes: Machine((8, 9), frozenset({"unsloth"})))
    model, peft_config, shown = loaded(folder)
    assert isinstance(model, LlamaForCausalLM) and peft_config.r == 4
    first, second = shown.strip().splitlines()
    assert first.startswith("engine: unsloth (CUDA and unsloth are available; vllm is not installed")
    assert second.startswith("engine: hf (unsloth cannot be imported (NotImplementedError: no accelerator)")
    with pytest.raises(EngineError, match="no accelerator.*mel-lite doctor"):
        loaded(folder, **{"model.engine": "unsloth"})


@pytest.mark.parametrize("frozen", [True, False])
def test_full_training_leaves_the_head_out_on_request(tmp_path: Path, frozen: bool) -> None:
    recipe = replace(recipe_for(save_tiny(tmp_path / "base")), lora=None)
    recipe = replace(recipe, model=replace(recipe.model, freeze_head=frozen))
    model, peft_config = load_model.load_for_training(recipe, build_args(recipe, tmp_path / "run"), Console(quiet=True))
    head = model.get_output_embeddings().weight
    untrained = [weight for weight in model.parameters() if not weight.requires_grad]
    assert peft_config is None and [weight is head for weight in untrained] == [True] * frozen


def fake_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, *, error: Exception | None = None, **set_: Any
) -> dict[str, Any]:
    """Return the arguments that a fake Unsloth receives when a recipe is loaded on a machine."""
    package = tmp_path / "site" / "unsloth"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(fake_unsloth.PACKAGE)
    monkeypatch.syspath_prepend(package.parent)
    for name in (STANDBY, KEEP_UTILIZATION):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setattr(fake_unsloth, "asked", {})
    monkeypatch.setattr(fake_unsloth, "fails_with", [error] if error else [])
    monkeypatch.setattr(load_model, "this_machine", lambda processes: machine)
    folder = tmp_path / "base"
    if not folder.exists():
        save_tiny(folder)
    try:
        model, peft_config, _ = loaded(folder, **({"model.dtype": "bfloat16"} | set_))
    finally:
        sys.modules.pop("unsloth", None)
    assert peft_config is None and hasattr(model, "peft_config"), "the adapter is there already"
    return fake_unsloth.asked


def test_arguments_for_unsloth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_load(
        tmp_path, monkeypatch, GPU,
        **{"model.load_in_4bit": True, "model.dtype": "bfloat16", "lora.r": 8, "train.seed": 11,
           "train.max_completion_length": 100, "data.max_prompt_tokens": 50, "train.max_context_tokens": 300,
           "train.analysis_max_tokens": 60},
    )  # fmt: skip
    lora = asked.pop("lora")
    assert str(asked.pop("dtype")) == "torch.bfloat16" and asked.pop("standby at import") == "1"
    assert asked == {
        "model_name": str(tmp_path / "base"), "load_in_4bit": True, "revision": None, "fast_inference": True,
        "max_lora_rank": 8, "gpu_memory_utilization": 0.5, "max_num_batched_tokens": 4096, "max_seq_length": 512,
        "use_gradient_checkpointing": False,
        "use_exact_model_name": True, "use_safetensors": True, "offload_embedding": False, "trust_remote_code": False,
        "random_state": 11,
    }  # fmt: skip
    assert lora["r"] == 8 and lora["target_modules"] == "all-linear" and lora["random_state"] == 11


def test_options_named_like_unsloths_are_passed_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_ = {
        "model.gpu_memory_utilization": 0.7, "model.max_num_seqs": 48, "model.max_lora_rank": 64,
        "model.max_seq_length": 333, "model.use_gradient_checkpointing": "unsloth", "train.grad_norm_every": 0,
    }  # fmt: skip
    asked = fake_load(tmp_path, monkeypatch, GPU, **set_, **SHORT, **{"train.algorithm": "grpo"})
    assert {name: asked[name.removeprefix("model.")] for name in set_ if "model" in name} == {
        name: value for name, value in set_.items() if "model" in name
    }
    assert asked["lora"]["use_gradient_checkpointing"] == "unsloth"
    assert os.environ[KEEP_UTILIZATION] == "1", "else Unsloth ignores the share in standby"
    without = fake_load(tmp_path, monkeypatch, CPU, **{"model.engine": "unsloth"})
    assert "fast_inference" not in without and without["standby at import"] is None


@pytest.mark.parametrize(
    ("set_", "message"),
    [
        ({"model.use_gradient_checkpointing": "unsloth", "train.grad_norm_every": 5}, "reentrant.*grad_norm_every=0"),
        ({"model.max_lora_rank": 2}, "max_lora_rank=2 is below the adapter's rank of 4"),
        ({"train.beta": 0.1}, "beta=0.1 with vLLM.*second adapter"),
        ({"model.max_seq_length": 333}, "max_seq_length=333 is below the 512 tokens.*Raise model.max_seq_length"),
    ],
)
def test_options_that_cannot_work_are_rejected(
    set_: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message):
        fake_load(tmp_path, monkeypatch, GPU, **set_)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (RuntimeError("No available memory for the cache blocks"), "Raise model.gpu_memory_utilization"),
        (RuntimeError("larger than the available KV cache memory"), "Raise model.gpu_memory_utilization"),
        (MemoryError("vLLM ran out of memory"), "Lower model.gpu_memory_utilization"),
        (torch.OutOfMemoryError("CUDA out of memory."), "Lower model.gpu_memory_utilization"),
    ],
)
def test_vllm_that_does_not_start_is_an_error_with_the_fix(
    error: Exception, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match=f"{type(error).__name__}: .*{fix}.*fast_inference=false") as raised:
        fake_load(tmp_path, monkeypatch, GPU, error=error)
    assert raised.value.exit_code == 6


def test_a_context_that_unsloth_shortens_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth silently shortens the context if it estimates that the share is too small. Answers would be truncated."""
    monkeypatch.setattr(fake_unsloth, "shortened_by", 12)
    with pytest.raises(EngineError, match="sequences of 321 tokens, but this run needs 333 tokens. Raise model.gpu_"):
        fake_load(tmp_path, monkeypatch, GPU, **{"model.max_seq_length": 333, "train.algorithm": "grpo"}, **SHORT)


def test_unsloth_may_load_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_unsloth, "loads_without_vllm", True)
    assert fake_load(tmp_path, monkeypatch, GPU)["fast_inference"] is True, "requested, and loaded without it"


@pytest.mark.parametrize(("asked", "given"), [(256, 255), (48, 48), (5000, 5000)])
def test_the_number_of_concurrent_sequences_is_as_requested(
    asked: int, given: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth replaces 256, its default. vLLM needs at least as many tokens per pass as sequences."""
    found = fake_load(tmp_path, monkeypatch, GPU, **{"model.max_num_seqs": asked})
    assert found["max_num_seqs"] == given and found["max_num_batched_tokens"] == max(4096, asked)


def test_the_longest_sequence_of_a_run(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")

    def longest(prompt_tokens: int | None = None, **more: Any) -> int:
        recipe = recipe_for(tmp_path / "base", **(SHORT | more))
        return load_model.longest_tokens(recipe, build_args(recipe, tmp_path / "run"), prompt_tokens)

    replay = 10 + 30 + load_model.PREFIX_TOKENS + 20
    assert longest() == replay > 130
    assert longest(**{"train.max_context_tokens": 400}) == 430
    assert longest(**{"train.algorithm": "grpo"}) == 30
    assert longest(**{"train.algorithm": "grpo", "eval.max_new_tokens": 200}) == 210
    assert longest(**{"train.max_context_tokens": None, "data.max_prompt_tokens": None}) == 512, "the model's context"
    assert longest(9, **{"data.max_prompt_tokens": None}) == replay - 1, "the longest actual prompt counts"
    assert longest(9) == replay, "a bound counts in full"
    bounded = {"train.max_context_tokens": None, "data.max_prompt_tokens": None, "model.max_seq_length": 400}
    assert longest(9, **bounded) == 400, "an unbounded C_retro takes what the bound leaves"
    open_retro = {"train.max_context_tokens": None, "train.max_completion_length": 20, "train.analysis_max_tokens": 30}
    assert longest(9, **open_retro, **{"data.max_prompt_tokens": None}) == min(512, 9 + 2 * 20 + 1024 + 30)
