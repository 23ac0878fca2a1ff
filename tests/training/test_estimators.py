"""REINFORCE++ and RFT against batches worked out by hand, alone and with lessons next to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mel_lite import MELConfig
from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise import LessonShare
from mel_lite.training.estimators import batch_advantages, only_right
from mel_lite.types import Verdict
from tiny_models import set_lora
from trainers import assert_learned, build, judged_rollouts


def test_batch_advantages_by_hand() -> None:
    # mean 0.5, deviations -0.5 0.5 0.5 -0.5, unbiased variance 1/3; the unscored row is in neither.
    found = batch_advantages(torch.tensor([0.0, 1.0, 1.0, torch.nan, 0.0]))
    unit = 0.5 / ((1 / 3) ** 0.5 + 1e-4)
    assert found.tolist() == pytest.approx([-unit, unit, unit, 0.0, -unit])
    # Without a baseline per question: in groups (0, 1) and (1, 1) GRPO gives the second group nothing.
    assert batch_advantages(torch.tensor([0.0, 1.0, 1.0, 1.0])).tolist() == pytest.approx(
        [-0.75 / (0.5 + 1e-4), *[0.25 / (0.5 + 1e-4)] * 3]
    )
    assert batch_advantages(torch.ones(4)).tolist() == [0.0] * 4
    assert batch_advantages(torch.tensor([1.0, torch.nan])).tolist() == [0.0, 0.0]


def test_only_right_masks_the_rest_and_counts_over_all_ranks() -> None:
    batch = {
        "completion_ids": torch.arange(9).reshape(3, 3),
        "completion_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
        "advantages": torch.tensor([0.3, -2.0, 1.0]),
        "num_items_in_batch": torch.tensor(6),
        "old_per_token_logps": torch.zeros(3, 3),
    }
    other_rank = 4
    right = only_right(batch, torch.tensor([True, False, True]), lambda t: torch.cat([t, t * 0 + other_rank]))
    assert right["completion_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert right["advantages"].tolist() == [1.0, 0.0, 1.0]
    assert right["num_items_in_batch"].item() == 3 + 1 + other_rank
    assert "old_per_token_logps" not in right and batch["completion_mask"].sum() == 6
    with_tool = batch | {"tool_mask": torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1]])}
    assert only_right(with_tool, torch.tensor([True, False, True]), lambda t: t)["num_items_in_batch"].item() == 1 + 1


def _captured(trainer: Any) -> list[dict[str, Any]]:
    """The micro-batches of the run, as the loss sees them."""
    seen: list[dict[str, Any]] = []
    compute = trainer._compute_loss

    def spy(model: Any, inputs: Any) -> torch.Tensor:
        loss = compute(model, inputs)
        seen.append(
            {
                "inputs": inputs,
                "loss": loss.detach().clone(),
                "policy": trainer._metrics["train"]["mel/policy_loss"][-1],
            }
        )
        return loss

    trainer._compute_loss = spy
    return seen


def _nll_of(model: Any, inputs: Any, row: int) -> torch.Tensor:
    """-log pi of each completion token of a row in float64, at temperature 1, by the plain logits."""
    prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
    answer = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()]
    logits = model(torch.cat([prompt, answer])[None]).logits[0].double()
    return torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], answer, reduction="none")


@pytest.mark.parametrize("lessons", [False, True])
def test_rft_is_the_nll_of_right_completions(tmp_path: Path, lessons: bool) -> None:
    options = {"max_steps": 1, "learning_rate": 1e-9, "temperature": 0.7, "per_device_train_batch_size": 16}
    trainer = build(tmp_path, algorithm="rft", meta_experience=lessons, **options)
    set_lora(trainer.model, 0.2)
    seen, rollouts = _captured(trainer), judged_rollouts(trainer)
    trainer.train()
    (step,) = seen
    verdicts = [rollout.verdict is Verdict.RIGHT for _, rollout in rollouts]
    assert 0 < sum(verdicts) < len(verdicts)
    inputs = step["inputs"]
    assert int((inputs["completion_mask"].sum(1) > 0).sum()) == sum(verdicts)
    with torch.no_grad():
        right = [row for row in range(16) if inputs["completion_mask"][row].any()]
        nll = torch.cat([_nll_of(trainer.model, inputs, row) for row in right])
    assert step["policy"] == pytest.approx(nll.mean().item(), rel=1e-4) and nll.mean() > 0.5
    assert bool(inputs.get("lessons", LessonShare()).lessons) == lessons
    extra = step["loss"].item() - step["policy"]
    assert (extra > 0.1) if lessons else extra == pytest.approx(0, abs=1e-6)


def test_rft_does_not_depend_on_how_the_batch_is_cut_up(tmp_path: Path) -> None:
    grads = []
    for micro in (16, 4):
        trainer = build(
            tmp_path, algorithm="rft", max_steps=1, optim="sgd", max_grad_norm=0.0, output_dir=tmp_path / f"run{micro}",
            per_device_train_batch_size=micro, gradient_accumulation_steps=16 // micro,
        )  # fmt: skip
        trainer.train()
        assert_learned(trainer)
        grads.append(torch.cat([p.detach().flatten() for n, p in trainer.model.named_parameters() if "lora_B" in n]))
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lessons", [False, True])
def test_reinforce_plus_plus_trains_on_batch_advantages(tmp_path: Path, lessons: bool) -> None:
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 16,
        "log_completions": True,
        "num_completions_to_print": 0,
    }
    trainer = build(tmp_path, algorithm="reinforce++", meta_experience=lessons, **options)
    seen, rollouts = _captured(trainer), judged_rollouts(trainer)
    trainer.train()
    assert_learned(trainer)
    reward = torch.tensor([float(rollout.verdict is Verdict.RIGHT) for _, rollout in rollouts])
    mean, std = reward.mean().item(), reward.std().item()
    assert 0 < mean < 1
    levels = sorted({round(a, 4) for a in seen[0]["inputs"]["advantages"].tolist()})
    assert levels == [round((0 - mean) / (std + 1e-4), 4), round((1 - mean) / (std + 1e-4), 4)]
    assert bool(seen[0]["inputs"].get("lessons", LessonShare()).lessons) == lessons
    logged = list(trainer._logs["advantages"])[-16:]
    assert logged == pytest.approx([(r - mean) / (std + 1e-4) for r in reward.tolist()], abs=1e-4)


def test_no_right_completion_leaves_rft_nothing_to_learn(tmp_path: Path) -> None:
    """A forward all the same, or ranks would wait for each other."""
    trainer = build(tmp_path, algorithm="rft", max_steps=1, reward_funcs=None)
    trainer.judge = lambda groups, texts: [Verdict.WRONG for _ in texts]
    seen = _captured(trainer)
    trainer.train()
    assert seen[0]["loss"].item() == 0.0
    assert all(p.detach().abs().sum() == 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)


def test_grpo_with_lessons_is_mel(tmp_path: Path) -> None:
    lines = []
    for name, options in (("a", {"algorithm": "mel"}), ("b", {"algorithm": "grpo", "meta_experience": True})):
        trainer = build(tmp_path, output_dir=tmp_path / name, max_steps=1, **options)
        trainer.train()
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        lines.append({key: line[key] for key in ("loss", "mel/nll", "grad_norm", "mel/replay_valid")})
    assert lines[0] == lines[1] and lines[0]["mel/replay_valid"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "mel", "meta_experience": False}, "meta_experience=False with algorithm='mel'"),
        ({"algorithm": "rft", "beta": 0.1}, "beta=0.1 with algorithm='rft'"),
        ({"algorithm": "rft", "entropy_coef": 0.1}, "entropy_coef=0.1 with algorithm='rft'"),
        ({"algorithm": "rft", "loss_type": "grpo"}, "loss_type='grpo' with algorithm='rft'"),
        ({"algorithm": "rft", "top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2 with algorithm='rft'"),
        (
            {"algorithm": "reinforce++", "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum' with algorithm='reinforce",
        ),
        ({"algorithm": "reinforce++", "scale_rewards": "none"}, "scale_rewards='none' with algorithm='reinforce"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        MELConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
