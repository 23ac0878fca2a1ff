"""Choice of the engine with its reason, and options that are rejected before anything is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

import fake_unsloth
from command_line import mel_lite_command
from mel_lite.engines.choice import BNB_PLUGIN, EngineChoice, Machine, choose_engine, planned_engine, this_machine
from mel_lite.engines.hf import HFEngine
from mel_lite.engines.unsloth import KEEP_UTILIZATION, STANDBY, adapter_fingerprint, is_unsloth
from mel_lite.errors import ConfigError, EngineError, ModelError
from mel_lite.models.adapters import LoraSpec, adapter_rank
from mel_lite.models.load import ModelSpec, load_base
from mel_lite.recipe import build_args, resolve
from mel_lite.run import load_model
from tiny_models import save_tiny
from trainers import build

ALL = frozenset({"unsloth", "vllm", BNB_PLUGIN})
GPU = Machine((8, 9), ALL)
CPU = Machine(None, ALL)


def chosen(machine: Machine, lora: LoraSpec | None = LoraSpec(), **model: Any) -> EngineChoice:  # noqa: B008
    return choose_engine(ModelSpec("demo", **model), lora, machine)


@pytest.mark.parametrize(
    ("machine", "model", "engine", "vllm", "reason"),
    [
        (GPU, {"load_in_4bit": True}, "unsloth", True, "CUDA and unsloth are available; vllm is installed"),
        (GPU, {"engine": "hf"}, "hf", False, "model.engine=hf"),
        (CPU, {}, "hf", False, "no CUDA device"),
        (CPU, {"engine": "unsloth"}, "unsloth", False, "Unsloth's CPU backend"),
        (Machine((8, 9), frozenset({"vllm"})), {}, "hf", False, 'not installed. Install it with `pip install "mel'),
        (Machine((8, 9), ALL, processes=2), {}, "hf", False, "2 processes train together"),
        (Machine((8, 9), frozenset({"unsloth"})), {}, "unsloth", False, "vllm is not installed: Unsloth's own"),
        (Machine((6, 1), ALL), {}, "unsloth", False, "compute capability (6, 1) is too old"),
        (Machine((7, 0), ALL), {}, "unsloth", False, "compute capability (7, 0) is too old"),
        (Machine((7, 5), ALL), {}, "unsloth", True, "vllm is installed"),
        (Machine((8, 9), ALL - {BNB_PLUGIN}), {"load_in_4bit": True}, "unsloth", False, "pip install vllm-bnb-plugin"),
        (Machine((8, 9), ALL - {BNB_PLUGIN}), {}, "unsloth", True, "vllm is installed"),
        (GPU, {"dtype": "float32"}, "unsloth", False, "model.dtype=float32, but vLLM shares 16-bit weights"),
        (GPU, {"max_lora_rank": 1024}, "unsloth", False, "vLLM serves adapters up to rank 512, not 1024"),
        (GPU, {"fast_inference": False}, "unsloth", False, "model.fast_inference=false"),
        (GPU, {"revision": "abc"}, "unsloth", False, "model.revision='abc', which vLLM under Unsloth ignores"),
        (GPU, {"attn_implementation": "eager"}, "hf", False, "Unsloth ignores model.attn_implementation='eager'"),
        (GPU, {"load_in_4bit": True, "quant_type": "fp4"}, "hf", False, "model.quant_type='fp4'"),
        (GPU, {"load_in_4bit": True, "double_quant": False}, "hf", False, "model.double_quant=False"),
    ],
)  # fmt: skip
def test_the_choice_and_its_reason(machine: Machine, model: Any, engine: str, vllm: bool, reason: str) -> None:
    choice = chosen(machine, **model)
    assert (choice.engine, choice.vllm) == (engine, vllm)
    assert reason in choice.reason and choice.line.startswith(f"engine: {engine}") and reason in choice.line
    assert ("with vLLM" in choice.line) == vllm


def test_a_plan_for_another_machine_does_not_describe_this_one() -> None:
    found = planned_engine(ModelSpec("demo", load_in_4bit=True), LoraSpec(), None)
    assert found.vllm and "mel-lite[gpu]" in found.reason and "available" not in found.reason
    found = planned_engine(ModelSpec("demo", revision="abc"), LoraSpec(), None)
    assert not found.vllm and found.engine == "unsloth" and "revision" in found.reason
    assert "available" not in found.reason
    assert planned_engine(ModelSpec("demo", engine="hf"), LoraSpec(), None).engine == "hf"
    assert planned_engine(ModelSpec("demo"), LoraSpec(), CPU).engine == "hf", "this machine"


def test_full_fine_tuning_uses_transformers() -> None:
    assert chosen(GPU, lora=None).engine == "hf"


@pytest.mark.parametrize(
    ("machine", "lora", "model", "message"),
    [
        (Machine((8, 9), frozenset()), LoraSpec(), {}, "unsloth is not installed. Install it with.*use --engine hf"),
        (Machine((8, 9), ALL, processes=4), LoraSpec(), {}, "serves one GPU, but 4 processes"),
        (GPU, None, {}, "lora=null"),
        (GPU, LoraSpec(), {"attn_implementation": "eager"}, "attn_implementation='eager'"),
    ],
)
def test_an_engine_that_cannot_be_used_is_rejected(machine: Machine, lora: Any, model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"engine='unsloth': .*{message}"):
        chosen(machine, lora=lora, engine="unsloth", **model)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"engine": "vllm"}, "engine='vllm' is not one of auto, unsloth, hf"),
        ({"gpu_memory_utilization": 1.5}, "must lie between 0 and 1"),
        ({"max_lora_rank": 0}, "max_lora_rank=0 must be at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_seq_length": -1}, "max_seq_length=-1 must be at least 1"),
    ],
)
def test_values_are_checked(option: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec("demo", **option)


def test_describing_the_machine_imports_nothing() -> None:
    before = set(sys.modules)
    this_machine()
    assert not {"unsloth", "vllm"} & (set(sys.modules) - before)


def test_the_command_line_rejects_an_engine_that_is_missing_or_unknown(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    arguments = ("train", "--gpu", "cpu", "--model", tmp_path / "base", "--set", "lora.start_from=null")
    if "unsloth" not in this_machine().packages:
        refused = mel_lite_command(*arguments, "--engine", "unsloth", "--output-dir", tmp_path / "a")
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert "engine='unsloth': the package unsloth is not installed" in refused.stderr
    unknown = mel_lite_command(*arguments, "--engine", "vllm", "--output-dir", tmp_path / "b")
    assert unknown.returncode == 2 and "model.engine='vllm' must be auto or unsloth or hf" in unknown.stderr


# ---- loading ----


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


def test_unsloth_receives_a_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth multiplies by the free memory, vLLM by the whole card: the result must be a share of the card."""
    from mel_lite.engines import unsloth

    assert unsloth._share_of_free(0.7) == 0.7 and unsloth._share_of_free(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(20e9), int(24e9)))
    asked = unsloth._share_of_free(0.7)
    assert asked is not None and asked * 20 / 24 == pytest.approx(0.7)
    assert unsloth._share_of_free(0.95) == 0.99 and unsloth._share_of_free(None) is None


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


# ---- engine of a trainer ----


def test_a_plain_model_samples_with_transformers(tmp_path: Path) -> None:
    from mel_lite.training.assemble import build_engine

    trainer = build(tmp_path)
    assert not is_unsloth(trainer.model)
    assert type(build_engine(trainer)) is HFEngine
    before = adapter_fingerprint(trainer.model)
    assert len(before) == 2 * sum("lora_" in name for name, _ in trainer.model.named_parameters())
    assert adapter_fingerprint(trainer.model) == before
    weight = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
    weight.data[0, 0] = 1e-6
    assert adapter_fingerprint(trainer.model) != before


def test_the_rank_is_that_of_the_adapter_a_run_starts_from() -> None:
    assert adapter_rank(LoraSpec(r=16)) == 16
    assert adapter_rank(LoraSpec(r=16, start_from="demo")) == 8, "the packaged warm start has rank 8"


def test_a_model_without_sdpa_is_loaded_with_eager_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_tiny(tmp_path / "base"))
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    assert load_base(ModelSpec(folder)).config._attn_implementation == "eager"
    with pytest.raises(ModelError, match="attn_implementation|scaled_dot_product"):
        load_base(ModelSpec(folder, attn_implementation="sdpa"))


def test_the_cpu_preset_hides_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from mel_lite.cli.main import app
    from mel_lite.run import train as run

    seen, check = [], run.check

    def watched(*arguments: Any) -> Any:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return check(*arguments)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(run, "check", watched)
    assert CliRunner().invoke(app, ["train", "--gpu", "cpu", "--dry-run"]).exit_code == 0
    assert seen == [""]
