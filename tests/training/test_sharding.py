"""FSDP2 on two processes (gloo, CPU): the run of one process, whole checkpoints, and sampling over gathered weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mel_lite.export.merge import export
from mel_lite.models.adapters import check_base
from mel_lite.models.load import ModelSpec
from mel_lite.resilience.checkpoint_files import problem
from rank_run import main as run_alone
from spread_runs import halved, launch, logged, stored, weights
from tiny_models import save_tiny

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets."""
SGD: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
RUNS: dict[str, dict[str, Any]] = {
    # Adam divides by the size of a gradient, which magnifies rounding; SGD does not.
    "lessons": SGD | {"max_steps": 6},
    "parts": SGD | {"max_steps": 6, "max_micro_batch_tokens": 150, "skip_zero_advantage": True, "temperature": 0.7},
    "distilled": SGD | {
        "max_steps": 3, "num_generations": 8, "internalisation": "distill",
        "internalisation_options": {"context": "sibling", "form": "kl", "reader": "frozen", "mask": "shift"},
    },
    "whole model": SGD | {"max_steps": 3, "lora": False, "learning_rate": 1e-3},
    "own samples": SGD | {"max_steps": 3, "engine": "hf", "reward_funcs": "even_ids", "probe_max_diff": 1e-3},
    "adam": SAVING | {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "overlap": SGD | {"max_steps": 6, "mel_schedule": "overlap"},
    "resumed": SAVING | {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}  # fmt: skip
"""Options of the runs by name; two processes have half of one's completions each."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs on two processes, one after another."""
    folder = tmp_path_factory.mktemp("two")
    runs = {name: halved(options) for name, options in RUNS.items()}
    for name in runs:
        save_tiny(folder / name / "base")
    runs["resumed"]["resume"] = str(folder / "adam" / "run" / "checkpoint-2")
    launch(folder, runs, FSDP2)
    return folder


def alone(folder: Path, name: str, **changes: Any) -> Path:
    save_tiny(folder / "base")
    run_alone(folder, RUNS[name] | changes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lessons", "overlap", "parts", "distilled", "whole model", "own samples"])
def test_two_processes_with_fsdp2_make_the_run_of_one(two: Path, tmp_path: Path, name: str) -> None:
    one = alone(tmp_path, name)
    expected = weights(one)
    for rank in (0, 1):
        found = weights(two / name, rank)
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            assert (found[key] - weight).norm() <= 1e-4 * weight.norm() + 1e-8, (rank, key)
    keys = ["loss", "reward", "mel/replay_valid", "mel/trained_tokens", "mel/nll", "mel/nll_after", "grad_norm"]
    ours, theirs = logged(two / name, *keys), logged(one, *keys)
    assert ours == [pytest.approx(step, rel=1e-3, abs=1e-5) for step in theirs]
    assert max(step[-1] for step in theirs) > 0
    assert stored(two / name) == stored(one)
    carried = [json.loads((two / name / f"carried-{rank}.json").read_text()) for rank in (0, 1)]
    if name in ("lessons", "parts"):
        assert len(stored(one)) > 2
        assert carried[0] != carried[1], "there is no step in which only one rank had a lesson"


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(two: Path) -> None:
    ends = [two / name / "run" / "checkpoint-4" for name in ("adam", "resumed")]
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json"):
        whole, resumed = ((folder / name).read_bytes() for folder in ends)
        assert whole == resumed, name
    assert all(problem(folder) is None for folder in ends)
    assert any(tensor.any() for tensor in load_file(ends[0] / "optimizer.safetensors").values())
    assert (weights(two / "adam")[next(iter(weights(two / "adam")))] != 0).any()


@pytest.mark.slow
def test_one_process_continues_the_run_of_two(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "adam", tmp_path / "one", ignore=shutil.ignore_patterns("checkpoint-4", "weights-*"))
    checkpoint = str(tmp_path / "one" / "run" / "checkpoint-2")
    run_alone(tmp_path / "one", RUNS["adam"] | {"resume": checkpoint})
    expected = weights(two / "adam")
    for key, weight in weights(tmp_path / "one").items():
        assert (weight - expected[key]).norm() <= 1e-3 * expected[key].norm(), key
    assert stored(tmp_path / "one") == stored(two / "adam")


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_a_plain_adapter(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two / "adam" / "run" / "checkpoint-4", tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(two / "adam" / "base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter")
    found = dict(plain.named_parameters())
    trained = weights(two / "adam")
    assert len(trained) == 28 and all(torch.equal(found[name], weight) for name, weight in trained.items())
    check_base(AutoModelForCausalLM.from_pretrained(two / "adam" / "base"), tmp_path / "adapter")
    report = export(tmp_path / "adapter", tmp_path / "merged", base=ModelSpec(str(two / "adam" / "base")))
    assert report.fidelity is not None and report.fidelity.top1_agreement == 1
