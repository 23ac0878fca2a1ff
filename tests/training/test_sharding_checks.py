"""Set-ups of FSDP and DeepSpeed that cannot work are refused before a model is loaded, with the fix."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.distributed.fsdp import MixedPrecisionPolicy

from mel_lite import MELConfig, MELTrainer
from mel_lite.errors import ConfigError
from mel_lite.recipe import resolve
from mel_lite.run.train import check
from mel_lite.training.sharding.checks import check_sharding, spread_by
from mel_lite.training.sharding.weights import in_own_dtype
from trainers import build


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the environment of `accelerate launch` for a version of FSDP."""

    def launched(version: int) -> None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", str(version))

    return launched


def config(tmp_path: Path, **options: Any) -> MELConfig:
    return MELConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)


def zero(stage: int, **zero_options: Any) -> Any:
    return SimpleNamespace(zero_stage=stage, deepspeed_config={"zero_optimization": {"stage": stage} | zero_options})


def test_what_spreads_the_weights_is_read_from_options_and_environment(tmp_path: Path, fsdp: Any) -> None:
    assert spread_by(config(tmp_path)) is None
    args = config(tmp_path)
    args.fsdp_plugin_args = {"fsdp_version": 2}
    assert spread_by(args) == "FSDP2"
    for stage, expected in ((1, None), (2, None), (3, "ZeRO-3")):
        args = config(tmp_path)
        args.deepspeed_plugin = zero(stage)
        assert spread_by(args) == expected
    fsdp(1)
    assert spread_by(config(tmp_path)) == "FSDP1"


@pytest.mark.parametrize(
    ("version", "options", "given", "message"),
    [
        (1, {}, {}, "fsdp_version=1: .*Set fsdp_version: 2"),
        (2, {}, {"load_in_4bit": True}, "load_in_4bit=true with FSDP2: .*model.load_in_4bit=false"),
        (2, {"engine_url": "http://localhost:1"}, {}, "engine_url='http://localhost:1' with FSDP2: .*unset engine_url"),
        (2, {"optim": "paged_adamw_8bit"}, {}, "optim=paged_adamw_8bit with FSDP2: .*train.optim=adamw_torch"),
        (2, {"top_entropy_quantile": 0.8}, {}, "top_entropy_quantile=0.8 with FSDP2: .*top_entropy_quantile=1.0"),
    ],
)
def test_each_is_refused_with_the_fix(
    tmp_path: Path, fsdp: Any, version: int, options: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    args = config(tmp_path, **options)
    check_sharding(args, **given)  # alone, each is fine
    fsdp(version)
    with pytest.raises(ConfigError, match=message):
        check_sharding(args, **given)


def test_zero3_must_gather_to_sample_and_to_save(tmp_path: Path) -> None:
    args = config(tmp_path, optim="paged_adamw_8bit")
    args.deepspeed_plugin = zero(3)
    check_sharding(args, adapter=True)
    with pytest.raises(ConfigError, match="stage3_gather_16bit_weights_on_model_save=False without an adapter"):
        check_sharding(args, adapter=False)
    args.deepspeed_plugin = zero(3, stage3_gather_16bit_weights_on_model_save=True)
    check_sharding(args, adapter=False)
    args.ds3_gather_for_generation = False
    with pytest.raises(ConfigError, match="ds3_gather_for_generation=False: .*or use ZeRO-2"):
        check_sharding(args, adapter=True)


def test_the_command_refuses_before_it_loads(tmp_path: Path, fsdp: Any) -> None:
    recipe = resolve(preset="24gb", overrides=[("train.use_cpu", True), ("train.bf16", False)])
    fsdp(2)
    with pytest.raises(ConfigError, match="load_in_4bit=true with FSDP2"):
        check(recipe, tmp_path)


def test_a_trainer_refuses_before_it_loads(tmp_path: Path, fsdp: Any) -> None:
    fsdp(1)
    rows = Dataset.from_list([{"prompt": "2 + 2 =", "answer": "4"}])
    with pytest.raises(ConfigError, match="fsdp_version=1"):
        MELTrainer("a/model-that-does-not-exist", args=config(tmp_path), train_dataset=rows)


def test_gradients_of_single_terms_are_not_measured_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mel_lite.training.sharding.weights.Sharding.in_lockstep", True)
    trainer = build(tmp_path, grad_norm_every=3)
    assert trainer.args.grad_norm_every == trainer.gradient_meter.every == 0
    assert "grad_norm_every=3: the gradients of single loss terms are not measured" in caplog.text


def test_results_of_a_forward_keep_their_dtype() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    kept = in_own_dtype(policy)
    assert (kept.param_dtype, kept.reduce_dtype, kept.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert in_own_dtype(None) is None
