"""Several ways at once: the loss is the weighted sum of what each adds alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise import get_internalisation
from mel_lite.types import Lesson
from teaching import Caught, assert_close, catch, distinct, expected_rows, gradients, loss_gradients, varied

SIBLING = {"context": "sibling"}


def nll(caught: Caught, lesson: Lesson) -> torch.Tensor:
    """-1/T sum_t log pi(target_t | context, target_<t) at temperature 1, from full logits."""
    ids_1T = torch.tensor([lesson.context_ids + lesson.target_ids])
    logp_TV = (
        caught.trainer.model(input_ids=ids_1T).logits[0, len(lesson.context_ids) - 1 : -1].double().log_softmax(-1)
    )
    return -logp_TV.gather(1, torch.tensor(lesson.target_ids)[:, None]).mean()


def mean_nll(caught: Caught, name: str, divisor: int | None = None) -> torch.Tensor:
    lessons = get_internalisation(name).lessons(caught.drawn)
    return torch.stack([nll(caught, lesson) for lesson in lessons]).sum() / (divisor or len(lessons))


def loss_and_gradients(caught: Caught) -> tuple[float, dict[str, torch.Tensor]]:
    """What the internalization adds to a step's loss, and its gradient."""
    total = 0.0
    for inputs in distinct(caught.micro_batches):
        without_policy = inputs | {"advantages": torch.zeros_like(inputs["advantages"])}
        loss = caught.trainer._compute_loss(caught.trainer.model, without_policy)
        loss.backward()
        total += loss.item()
    return total, gradients(caught.trainer)


def test_nll_and_divergence_add_up_by_weight(tmp_path: Path) -> None:
    caught = catch(
        tmp_path, analysis=varied, internalisation={"analysis": 0.5, "distill": 2.0},
        internalisation_options={"distill": SIBLING},
    )  # fmt: skip
    tokens = sum(len(rollout.completion_ids) for _, rollout in caught.rows)
    divergence = sum(kl_T[use_T].sum() for kl_T, use_T, _ in expected_rows(caught, SIBLING).values()) / tokens
    expected = 0.3 * (0.5 * mean_nll(caught, "analysis") + 2.0 * divergence)
    loss, grads = loss_and_gradients(caught)
    assert loss == pytest.approx(expected.item(), rel=1e-5) and divergence > 1e-2
    assert_close(grads, loss_gradients(caught.trainer, expected))


@pytest.mark.parametrize("normalization", ["kept", "prompts"])
def test_each_way_keeps_its_own_mean_over_its_lessons(tmp_path: Path, normalization: str) -> None:
    """`both` makes two lessons where `right` makes one."""
    caught = catch(
        tmp_path, analysis=varied, mel_normalization=normalization, internalisation={"both": 1.0, "right": 0.25}
    )
    divisor = len(caught.drawn.groups) if normalization == "prompts" else None
    expected = 0.3 * (mean_nll(caught, "both", divisor) + 0.25 * mean_nll(caught, "right", divisor))
    loss, grads = loss_and_gradients(caught)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_close(grads, loss_gradients(caught.trainer, expected))


def test_advantages_pass_through_the_ways_in_order(tmp_path: Path) -> None:
    """Credit scales GRPO's advantages; the sampled form of distillation adds to the result."""
    credit, distill = {"context": "own", "from_fork": False}, SIBLING | {"form": "sampled"}
    both = catch(
        tmp_path / "both", analysis=varied, internalisation={"credit": 0.5, "distill": 2.0},
        internalisation_options={"credit": credit, "distill": distill},
    )  # fmt: skip
    scaled = catch(
        tmp_path / "a", analysis=varied, mel_weight=0.15, internalisation="credit", internalisation_options=credit
    )
    added = catch(tmp_path / "b", mel_weight=0.6, internalisation="distill", internalisation_options=distill)
    extra_BC = added.after["advantages"] - added.before["advantages"][:, None]
    assert torch.allclose(both.after["advantages"], scaled.after["advantages"] + extra_BC, atol=1e-5)
    assert (scaled.after["advantages"] - scaled.before["advantages"][:, None]).abs().max() > 0.01 and extra_BC.any()


def test_two_ways_that_write_the_same_entry_are_refused(tmp_path: Path) -> None:
    again = "mel_lite.lessons.internalise.distill:Distill"
    with pytest.raises(ConfigError, match=f"{again} writes teacher_hidden, teacher_mask, as another way of"):
        catch(
            tmp_path, internalisation={"distill": 1.0, again: 1.0},
            internalisation_options={"distill": SIBLING, again: SIBLING},
        )  # fmt: skip


@pytest.mark.parametrize("weight", [0, -0.5, float("nan"), float("inf"), True, "0.3", None])
def test_weights_that_are_no_numbers_above_0_are_refused(weight: Any) -> None:
    with pytest.raises(ConfigError, match="internalisation: weight .* of 'analysis' must be a number above 0"):
        get_internalisation({"analysis": weight})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ({}, {}, "internalisation={} names no way"),
        (None, {}, "internalisation=None names no way"),
        (
            {"analysis": 1.0},
            {"distill": SIBLING},
            "internalisation_options has 'distill', which is not one of analysis",
        ),
        (
            {"distill": 1.0},
            SIBLING,
            "internalisation_options has 'context', .* give the options of each under its name",
        ),
        ({"distill": 1.0}, {"distill": "sibling"}, r"internalisation_options\['distill'\]='sibling' is no mapping"),
        ({"distil": 1.0}, {}, "internalisation='distil' is not one of .*Did you mean 'distill'"),
        ("analysis", {"form": "kl"}, "internalisation_options: 'analysis' has no option 'form'; it takes shuffled"),
    ],
)
def test_names_and_options_that_do_not_fit_are_refused(name: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_internalisation(name, options)


def test_a_combination_needs_what_one_of_its_ways_needs() -> None:
    options: dict[str, Any] = {"distill": SIBLING | {"reader": "frozen"}}
    alone = get_internalisation("distill", options["distill"])
    both = get_internalisation({"replay": 1.0, "distill": 1.0}, options)
    assert (alone.writes_lessons, both.writes_lessons) == (False, True)
    assert (alone.needs_replay, both.needs_replay) == (False, True)
    assert both.needs_frozen_reader and both.needs_frozen_head and not both.uses_bank
    assert get_internalisation({"distill": 1.0}, {"distill": {"context": "bank"}}).uses_bank
    texts = {"both": 1.0, "analysis": 1.0}
    assert get_internalisation(texts).texts_per_experience == 3 and get_internalisation(texts).trains_whole_analysis
