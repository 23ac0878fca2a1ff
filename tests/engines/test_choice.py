"""Choice of the engine with its reason, and options that are rejected before anything is loaded."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.engines.choice import (
    BNB_PLUGIN,
    EngineChoice,
    Machine,
    check_engine,
    choose_engine,
    planned_engine,
    this_machine,
)
from mel_lite.engines.hf import HFEngine
from mel_lite.engines.unsloth import adapter_fingerprint, is_unsloth
from mel_lite.errors import ConfigError, ModelError
from mel_lite.models.adapters import LoraSpec, adapter_rank
from mel_lite.models.load import ModelSpec, load_base
from mel_lite.recipe import resolve
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
        (Machine((8, 9), frozenset({"vllm"})), {}, "hf", False, 'not installed. Install it with `pip install -e "/'),
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
    assert found.vllm and "the extra `gpu`" in found.reason and "available" not in found.reason
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


@pytest.mark.slow
def test_the_command_line_rejects_an_engine_that_is_missing_or_unknown(tmp_path: Path) -> None:
    arguments = ["train", "--gpu", "cpu", "--model", str(save_tiny(tmp_path / "base")), "--set", "lora.start_from=null"]
    if "unsloth" not in this_machine().packages:
        missing = CliRunner().invoke(app, [*arguments, "--engine", "unsloth", "--output-dir", str(tmp_path / "a")])
        assert isinstance(missing.exception, ConfigError)
        assert "engine='unsloth': the package unsloth is not installed" in str(missing.exception)
    unknown = CliRunner().invoke(app, [*arguments, "--engine", "vllm", "--output-dir", str(tmp_path / "b")])
    assert isinstance(unknown.exception, ConfigError)
    assert "model.engine='vllm' must be auto or unsloth or hf" in str(unknown.exception)


def test_unsloth_receives_a_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth multiplies by the free memory, vLLM by the whole card: the result must be a share of the card."""
    from mel_lite.engines import unsloth

    assert unsloth._share_of_free(0.7) == 0.7 and unsloth._share_of_free(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(20e9), int(24e9)))
    asked = unsloth._share_of_free(0.7)
    assert asked is not None and asked * 20 / 24 == pytest.approx(0.7)
    assert unsloth._share_of_free(0.95) == 0.99 and unsloth._share_of_free(None) is None


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
    from mel_lite.run import train as run

    seen, check = [], run.check

    def watched(*arguments: Any) -> Any:
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        return check(*arguments)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(run, "check", watched)
    assert CliRunner().invoke(app, ["train", "--gpu", "cpu", "--dry-run"]).exit_code == 0
    assert seen == [""]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([("model.engine", "vllm-server")], "without engine_url: give the server's address with --engine-url"),
        ([("train.engine_url", "http://x")], "engine_url='http://x' with engine='hf'.*--engine vllm-server"),
    ],
)
def test_a_server_needs_its_address_and_an_adapter(options: list[tuple[str, Any]], said: str) -> None:
    recipe = resolve(preset="cpu", overrides=options)
    with pytest.raises(ConfigError, match=said):
        check_engine(choose_engine(recipe.model, recipe.lora, CPU), recipe)


def test_a_server_samples_for_a_model_that_transformers_loads() -> None:
    recipe = resolve(preset="cpu", overrides=[("model.engine", "vllm-server"), ("train.engine_url", "http://x")])
    choice = choose_engine(recipe.model, recipe.lora, GPU)
    check_engine(choice, recipe)
    with pytest.raises(ConfigError, match="engine='vllm-server' with lora=null"):
        check_engine(choice, replace(recipe, lora=None))
    assert (choice.engine, choice.vllm, choice.title) == ("vllm-server", False, "a vLLM server")
