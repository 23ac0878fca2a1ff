"""Conclusions of a comparison in sentences, and their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mel_lite.intervals import Estimate
from mel_lite.report.arms import Arm, Comparison, labels

FEW_SEEDS = 5


@dataclass(frozen=True, slots=True)
class Control:
    """An arm that leaves something out, and what a difference to it shows."""

    ahead: str
    """Conclusion when another arm is ahead of it."""
    otherwise: str
    of: tuple[str, ...] | None = None
    """The arms that it is a control of; None = all that are no control, except `but`."""
    but: tuple[str, ...] = ()

    def treats(self, name: str, controls: Mapping[str, Control]) -> bool:
        """Return True for an arm that this is a control of."""
        return name not in controls and name not in self.but if self.of is None else name in self.of


def conclusions(found: Comparison, controls: Mapping[str, Control]) -> tuple[str, ...]:
    """Return what follows for each arm against the first, and against each control of it."""
    first = found.arms[0].name
    pairs = [(arm.name, first, arm.difference, arm.paired_seeds, arm.seeds_ahead) for arm in found.arms[1:]]
    pairs += [(each.arm, each.control, each.difference, each.paired_seeds, each.seeds_ahead) for each in found.against]
    return tuple(
        _conclusion(name, other, lead["avg_at_k"], found.samples, seeds, ahead, controls)
        for name, other, lead, seeds, ahead in pairs
        if lead
    )


def _conclusion(
    name: str, first: str, lead: Estimate, samples: int, seeds: int, ahead: int, controls: Mapping[str, Control]
) -> str:
    span = f"{abs(100 * lead.value):.1f} points [{100 * lead.low:+.1f}, {100 * lead.high:+.1f}]"
    if not lead.excludes_zero:
        sentence = (
            f"{name} and {first} cannot be told apart: the difference in Avg@{samples} is {lead.as_points()} points, "
            "and its interval contains 0."
        )
    elif lead.value > 0:
        sentence = f"{name} ends {span} above {first} in Avg@{samples}."
    else:
        sentence = f"{name} ends {span} below {first} in Avg@{samples}."
    if seeds > 1:
        sentence += f" It is ahead on {ahead} of {seeds} seeds."
    for arm, other, is_ahead in ((name, first, lead.low > 0), (first, name, lead.high < 0)):
        control = controls.get(other)
        if control is not None and control.treats(arm, controls):
            sentence += f" So {(control.ahead if is_ahead else control.otherwise).format(arm=arm)}."
    return sentence


def limits(found: Comparison, arms: Sequence[Arm]) -> tuple[str, ...]:
    """Return what keeps the comparison from showing more."""
    runs = [run for arm in arms for run in arm.runs]
    named = list(zip(labels(runs), runs, strict=True))
    found_limits = [f"{name}: {problem}" for name, run in named for problem in run.problems]
    fewest = min(len(arm.runs) for arm in arms)
    if found.tasks and fewest == 1:
        found_limits.append(
            "At least one arm is a single run. The intervals cover the choice of tasks and not the luck of training: "
            "with another seed the order can be different. Train each arm with several seeds."
        )
    elif found.tasks and fewest < FEW_SEEDS:
        found_limits.append(
            f"With {fewest} seeds per arm the intervals are narrower than they should be. The number of seeds ahead is "
            "the more robust figure."
        )
    if found.tasks and any(not arm.paired_seeds for arm in found.arms[1:]):
        found_limits.append("The arms do not have the same seeds, so runs are not compared seed by seed.")
    first = len(found.arms[0].seeds)
    partly = [arm for arm in found.arms[1:] if 0 < arm.paired_seeds < max(first, len(arm.seeds))]
    found_limits += [
        f"The difference of {arm.name} is over the seeds that it shares with {found.arms[0].name} "
        f"({arm.paired_seeds}), the figures of an arm over all of its seeds."
        for arm in partly
    ]
    tokens = [arm.tokens for arm in found.arms]
    if min(tokens) < 0.95 * max(tokens):
        each = ", ".join(f"{arm.name} {arm.tokens:,.0f}" for arm in found.arms)
        found_limits.append(f"The arms did not generate equally many tokens ({each}), so they did not cost the same.")
    found_limits += [f"{name} has not finished ({run.steps} steps)." for name, run in named if not run.finished]
    if found.tasks and _begin_differently(arms):
        found_limits.append("Runs of one seed answered differently before training: they began with different models.")
    if len(found.arms) > 2 and found.tasks:
        found_limits.append(
            f"{len(found.arms) - 1} arms are compared with one: the more arms, the likelier a lucky one."
        )
    return tuple(found_limits)


def _begin_differently(arms: Sequence[Arm]) -> bool:
    """Return True when two runs of one seed, from which the evaluation draws, have different scores at the start."""
    starts: dict[Any, set[Any]] = {}
    for run in (run for arm in arms for run in arm.runs):
        if run.before is not None:
            starts.setdefault(run.option("train.seed"), set()).add(run.before.scores)
    return any(len(scores) > 1 for scores in starts.values())


__all__ = ["Control", "conclusions", "limits"]
