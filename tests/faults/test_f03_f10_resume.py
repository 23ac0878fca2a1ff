"""F3, F10: resuming at every boundary between phases, and across epochs of odd size. Other options: test_f09_*.py.

test_f01_f02_kills.py compares states after a kill, test_f08_signals.py after a signal in every phase.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mel_lite.models.load import ModelSpec, load_base
from tiny_models import save_tiny
from trainers import assert_learned, build, run_state, step_log, sums, trainable

COMMON: dict[str, Any] = {
    "max_steps": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
}
PHASES = ("after rollout", "after verification", "after replay", "mid accumulation", "before the update")


class PowerCut(RuntimeError):
    """Error that ends a run at a boundary."""


def cut(trainer: Any, phase: str) -> None:
    """End the run in its third step, at the given boundary."""

    def ends(owner: Any, name: str, *, call: int = 1, before: bool = True) -> None:
        original, calls = getattr(owner, name), [0]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += trainer.state.global_step == 2
            if before and calls[0] == call:
                raise PowerCut
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    {
        "after rollout": lambda: ends(trainer, "_calculate_rewards"),
        "after verification": lambda: ends(trainer, "_draw"),
        "after replay": lambda: ends(trainer, "_internalise"),
        "mid accumulation": lambda: ends(trainer, "_compute_loss", call=2),
        "before the update": lambda: ends(trainer.nonfinite, "before_update"),
    }[phase]()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder, **COMMON)
    trainer.train()
    assert_learned(trainer)
    return run_state(trainer), step_log(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_cut_at_a_boundary_is_redone_the_same(tmp_path: Path, whole: Any, phase: str) -> None:
    trainer = build(tmp_path, **COMMON)
    cut(trainer, phase)
    with pytest.raises(PowerCut):
        trainer.train()
    resumed = build(tmp_path, **COMMON)
    resumed.train(resume_from_checkpoint=True)
    assert (run_state(resumed), step_log(tmp_path / "run")) == whole


@pytest.mark.slow
def test_no_prompt_is_skipped_or_repeated_over_two_odd_epochs(tmp_path: Path) -> None:
    """7 prompts, 2 per step: 3 steps per epoch and one prompt left over. The run is cut in the second epoch."""
    options = COMMON | {"train_dataset": sums(7), "max_steps": 6, "per_device_train_batch_size": 8,
                        "gradient_accumulation_steps": 1}  # fmt: skip

    def prompts(trainer: Any) -> list[list[str]]:
        seen: list[list[str]] = []
        original = trainer._calculate_rewards

        def spy(inputs: Any, *args: Any) -> Any:
            if trainer.model.training:
                seen.append([row["prompt"][0]["content"] for row in inputs])
            return original(inputs, *args)

        trainer._calculate_rewards = spy
        return seen

    whole = build(tmp_path, output_dir=tmp_path / "whole", **options)
    expected = prompts(whole)
    whole.train()

    first = build(tmp_path, **options)
    got = prompts(first)
    step = first.training_step

    def ends(*args: Any) -> torch.Tensor:
        if first.state.global_step == 4:
            raise PowerCut
        return step(*args)

    first.training_step = ends
    with pytest.raises(PowerCut):
        first.train()
    resumed = build(tmp_path, **options)
    rest = prompts(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert got[:4] + rest == expected
    for epoch in (expected[:3], expected[3:]):
        counts = Counter(prompt for batch in epoch for prompt in batch)
        assert len(counts) == 6 and set(counts.values()) == {4}
    assert run_state(resumed) == run_state(whole)


@pytest.mark.slow
def test_a_16_bit_adapter_stays_16_bit_when_a_run_is_resumed(tmp_path: Path) -> None:
    """TRL keeps the adapter of a 4-bit base in bfloat16, but PEFT loads it in float32, which would change the run."""
    base = save_tiny(tmp_path / "base")

    def run(folder: str, steps: int) -> Any:
        model = load_base(ModelSpec(str(base), dtype="float32", load_in_4bit=True))
        saving = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
        return build(tmp_path, output_dir=tmp_path / folder, model=model, max_steps=steps, **saving)

    whole = run("whole", 3)
    whole.train()
    run("cut", 2).train()
    resumed = run("cut", 3)
    resumed.train(resume_from_checkpoint=True)
    assert {weight.dtype for weight in trainable(resumed).values()} == {torch.bfloat16}
    for name, weight in trainable(whole).items():
        assert torch.equal(trainable(resumed)[name], weight), name
    assert_learned(resumed)
