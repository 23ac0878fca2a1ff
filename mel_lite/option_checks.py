"""Refuse options of `MELConfig` that contradict each other, before anything is loaded."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from dataclasses import fields
from typing import Any

from mel_lite.errors import ConfigError, check_choice
from mel_lite.trl_compat import released_grpo_config
from mel_lite.types import Algorithm, ReplayCriterion, Schedule

logger = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {option.name: option.default for option in fields(released_grpo_config())}
"""TRL's defaults."""
ALSO_ZERO = {
    "beta": "a KL term", "entropy_coef": "an entropy bonus", "use_adaptive_entropy": "an entropy bonus",
    "top_entropy_quantile": "a choice of tokens",
}  # fmt: skip
"""Options that read completions of advantage 0, and what they add."""
_RFT: dict[str, Any] = {"loss_type": "cispo", "epsilon_high": 1.0, "vllm_importance_sampling_correction": False}
"""TRL options whose loss is -advantage * log pi at ratio 1, with no correction for the sampling policy."""


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
_AT_LEAST: dict[str, float] = {
    "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "beta": 0, "epsilon": 0, "entropy_coef": 0,
    "num_iterations": 1,
}  # fmt: skip


def check_trl_values(args: Any) -> None:
    """Refuse values of TRL's options that fail only in the first step, or train on nonsense. Raises: ConfigError."""
    check_choice("loss_type", args.loss_type, LOSS_TYPES)
    for name, least in _AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name}={value} must be at least {least:g}. Raise {name}.")
    if not args.temperature > 0:
        raise ConfigError(
            f"temperature={args.temperature} must be positive: without sampling all completions of a group are equal, "
            "and nothing can be learned from them."
        )


def check_estimator(args: Any) -> None:
    """Refuse options that contradict `algorithm`, and set the TRL options that it implies."""
    if args.algorithm == Algorithm.MEL and args.meta_experience is False:
        raise ConfigError(
            "meta_experience=False with algorithm='mel': mel is grpo with meta-experience. Set algorithm='grpo'."
        )
    if args.algorithm == Algorithm.REINFORCE_PP and args.scale_rewards not in ("group", "batch"):
        raise ConfigError(
            f"scale_rewards={args.scale_rewards!r} with algorithm='reinforce++', which divides by the batch's "
            "standard deviation. Leave scale_rewards unset."
        )
    if args.algorithm == Algorithm.REINFORCE_PP and args.multi_objective_aggregation != "sum_then_normalize":
        raise ConfigError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} with algorithm='reinforce++', which "
            "normalizes the weighted sum of the rewards. Leave it unset."
        )
    if args.algorithm != Algorithm.RFT:
        return
    for name in ("beta", "entropy_coef", "top_entropy_quantile"):
        if getattr(args, name) != DEFAULTS[name]:
            raise ConfigError(
                f"{name}={getattr(args, name)} with algorithm='rft', which is a plain NLL: {ALSO_ZERO[name]} has "
                f"no place in it. Unset {name}."
            )
    if args.loss_type not in (DEFAULTS["loss_type"], "cispo"):
        raise ConfigError(
            f"loss_type={args.loss_type!r} with algorithm='rft', which is a plain NLL, averaged over the tokens of "
            "right completions. Leave loss_type unset."
        )
    for name, value in _RFT.items():
        setattr(args, name, value)


def check_schedule(args: Any) -> None:
    """Refuse a bound on staleness that no lesson meets; warn of a schedule without lessons. Raises: ConfigError."""
    bound = args.max_staleness_steps
    if bound is not None and bound < 1:
        raise ConfigError(
            f"max_staleness_steps={bound} must be at least 1, or null for no bound. mel_schedule='strict' has lessons "
            "of staleness 0."
        )
    if args.mel_schedule != Schedule.OVERLAP:
        return
    if not args.with_meta_experience:
        warnings.warn(
            f"mel_schedule='overlap' has no effect with algorithm={args.algorithm!r}, which writes no lessons.",
            UserWarning,
            stacklevel=4,
        )
        return
    batches = 2 if ReplayCriterion(args.replay_criterion).replays else 1
    least = math.ceil(batches * args.steps_per_batch)
    if bound is not None and bound < least:
        raise ConfigError(
            f"max_staleness_steps={bound} with mel_schedule='overlap': a lesson is complete {batches} generation "
            f"batch{'es' if batches > 1 else ''} of {args.steps_per_batch:g} optimizer steps after its rollouts, so "
            f"none would be trained on. Set max_staleness_steps to {least} or more, or mel_schedule='strict'."
        )


def lessons_for(args: Any, tools: Any, environment_factory: Any) -> Any:
    """Return `args`; with tools or environments, a copy without lessons. Warns about the change."""
    used = [name for name, value in (("tools", tools), ("environment_factory", environment_factory)) if value]
    if not (used and getattr(args, "with_meta_experience", False)):
        return args
    plain = copy.copy(args)
    plain.algorithm, plain.meta_experience = args.estimator, None
    logger.warning(
        "%s with %s: training with algorithm=%r alone, without lessons. Analyses compare two answers of one turn; they "
        "are not written for rollouts that call tools. Set algorithm=%r to silence this warning.",
        " and ".join(used),
        f"algorithm={args.algorithm!r}" if args.meta_experience is None else "meta_experience=True",
        plain.algorithm,
        plain.algorithm,
    )
    return plain
