"""DeepSpeed ZeRO-2 and ZeRO-3 on two processes (gloo, CPU), where DeepSpeed is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mel_lite.resilience.checkpoint_files import problem
from rank_run import main as run_alone
from real_packages import DEEPSPEED_SITE, needs_deepspeed
from spread_runs import halved, launch, logged, stored, weights
from tiny_models import save_tiny

pytestmark = [needs_deepspeed, pytest.mark.slow]

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
RUNS: dict[str, dict[str, Any]] = {
    # Adam divides by the size of a gradient, which magnifies rounding; SGD does not.
    "lessons": {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 6, "max_micro_batch_tokens": 1000},
    "adam": SAVING | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "resumed": SAVING | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}
"""Options of the runs by name; two processes have half of one's completions each."""


@pytest.fixture(scope="module", params=[2, 3])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs on two processes with one stage of ZeRO, as configs/accelerate/zero3.yaml sets it."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    runs = {name: halved(options) for name, options in RUNS.items()}
    for name in runs:
        save_tiny(folder / name / "base")
    runs["resumed"]["resume"] = str(folder / "adam" / "run" / "checkpoint-2")
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(request.param),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    launch(folder, runs, environment, sites=(DEEPSPEED_SITE,))
    return folder


def test_two_processes_make_the_run_of_one(two: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    run_alone(tmp_path, dict(RUNS["lessons"]))
    for rank in (0, 1):
        found = weights(two / "lessons", rank)
        for key, weight in weights(tmp_path).items():
            assert (found[key] - weight).norm() <= 1e-4 * weight.norm() + 1e-8, (rank, key)
    keys = ["loss", "reward", "mel/replay_valid", "mel/trained_tokens", "mel/nll", "mel/nll_after"]
    assert logged(two / "lessons", *keys) == [
        pytest.approx(step, rel=1e-3, abs=1e-5) for step in logged(tmp_path, *keys)
    ]
    assert stored(two / "lessons") == stored(tmp_path) and len(stored(tmp_path)) > 2
    carried = [json.loads((two / "lessons" / f"carried-{rank}.json").read_text()) for rank in (0, 1)]
    assert carried[0] != carried[1], "there is no step in which only one rank had a lesson"


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(two: Path) -> None:
    whole, resumed = (two / name / "run" / "checkpoint-4" for name in ("adam", "resumed"))
    assert problem(whole) is None and problem(resumed) is None
    ends = [load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed)]
    before = load_file(two / "adam" / "run" / "checkpoint-2" / "adapter_model.safetensors")
    assert len(ends[0]) == 28 and all(torch.equal(ends[1][key], weight) for key, weight in ends[0].items())
    assert any(not torch.equal(before[key], weight) for key, weight in ends[0].items())
    trained = weights(two / "adam")
    for key, weight in ends[0].items():
        name = key.replace(".weight", ".default.weight")
        assert torch.equal(trained[name], weight), key
