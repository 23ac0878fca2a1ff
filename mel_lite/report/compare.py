"""Comparison of finished runs: paired differences over tasks and seeds, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mel_lite.report.arms import Against, Arm, ArmResult, Comparison, labels
from mel_lite.report.charts import Chart, Line, smoothed, thinned
from mel_lite.report.conclusions import Control, conclusions, limits
from mel_lite.report.runs import Run, evaluations, generated_tokens, series, training_seconds
from mel_lite.report.statistics import difference, interval, measures

if TYPE_CHECKING:
    import numpy as np

MARKED = 12
"""Most points of a line that are marked."""


def compare(
    arms: Sequence[Arm], *, left_out: Sequence[str] = (), controls: Mapping[str, Control] | None = None
) -> Comparison:
    """Compare the final evaluations of all arms with those of the first one, and of each control.

    Args:
        left_out: sentences on runs that belong to the arms and are missing.
        controls: arms that are controls, by name, with what they show.
    """
    known = controls or {}
    tasks, samples, problem = _shared_tasks(arms)
    values = [_values(arm, tasks, samples) for arm in arms] if tasks else [{} for _ in arms]
    results = tuple(
        _result(arm, each, arms[0], values[0] if i else None)
        for i, (arm, each) in enumerate(zip(arms, values, strict=True))
    )
    against = []
    for i, control in enumerate(arms[1:], start=1):
        for arm, each in zip(arms[1:], values[1:], strict=True):
            if control.name in known and known[control.name].treats(arm.name, known):
                found = _result(arm, each, control, values[i])
                against.append(Against(arm.name, control.name, found.difference, found.paired_seeds, found.seeds_ahead))
    compared = Comparison(results, len(tasks), samples, tuple(against), (), ())
    return replace(
        compared,
        conclusions=conclusions(compared, known),
        limits=(*problem, *left_out, *limits(compared, arms)),
    )


def _shared_tasks(arms: Sequence[Arm]) -> tuple[list[str], int, tuple[str, ...]]:
    """Return the tasks that every run was evaluated on, the samples per task, and why there are none."""
    runs = [run for arm in arms for run in arm.runs]
    without = [name for name, run in zip(labels(runs), runs, strict=True) if run.after is None]
    if without:
        return [], 0, (f"No final evaluation: {', '.join(without)}. Only training curves are compared.",)
    finals = [run.after for run in runs if run.after is not None]
    if len({final.samples for final in finals}) > 1:
        return [], 0, ("The runs were evaluated with different numbers of samples per task and cannot be compared.",)
    hashes = [{score.prompt_hash for score in final.scores} for final in finals]
    shared = [score.prompt_hash for score in finals[0].scores if all(score.prompt_hash in each for each in hashes)]
    shared = list(dict.fromkeys(shared))
    if not shared:
        return [], 0, ("The runs were evaluated on different tasks and cannot be compared. Train with one data.eval.",)
    most = max(map(len, hashes))
    partly = (f"Only the {len(shared)} of {most} tasks that all evaluations share are compared.",)
    return shared, finals[0].samples, partly if len(shared) < most else ()


def _values(arm: Arm, tasks: list[str], samples: int) -> dict[str, np.ndarray]:
    """Return Pass@1, Avg@k and Pass@k after training, each of shape (runs, tasks)."""
    scores = [{score.prompt_hash: score for score in run.after.scores} for run in arm.runs if run.after is not None]
    greedy = [[each[task].greedy_right for task in tasks] for each in scores]
    right = [[each[task].samples_right for task in tasks] for each in scores]
    return measures(greedy, right, samples)


def _result(arm: Arm, values: dict[str, np.ndarray], first: Arm, reference: dict[str, np.ndarray] | None) -> ArmResult:
    both = [seed for seed in arm.seeds if seed is not None and seed in first.seeds]
    if len(set(arm.seeds)) < len(arm.seeds) or len(set(first.seeds)) < len(first.seeds):
        both = []  # several runs of one seed: there is no telling which belong together
    differences, ahead = {}, 0
    for name, ours in values.items() if reference is not None else ():
        theirs = reference[name] if reference is not None else ours
        if both:
            rows = [[each.seeds.index(seed) for seed in both] for each in (arm, first)]
            differences[name] = difference(ours[rows[0]], theirs[rows[1]], paired_runs=True)
            if name == "avg_at_k":
                ahead = int((ours[rows[0]].mean(1) > theirs[rows[1]].mean(1)).sum())
        else:
            differences[name] = difference(ours, theirs, paired_runs=False)
    return ArmResult(
        arm.name,
        tuple(str(run.folder) for run in arm.runs),
        tuple(arm.seeds),
        arm.steps,
        arm.tokens,
        arm.seconds,
        {name: interval(each) for name, each in values.items()},
        differences,
        len(both) if reference is not None else 0,
        ahead,
    )


def charts(arms: Sequence[Arm]) -> list[tuple[str, Chart]]:
    """Return the learning curves: evaluations and rollouts over generated tokens and over training time."""
    axes = {
        "tokens": ("generated tokens, thousands", 1000.0, generated_tokens),
        "time": ("training time, minutes", 60.0, training_seconds),
    }
    found = []
    for name, (label, scale, progress) in axes.items():
        lines: dict[str, list[Line]] = {"eval": [], "reward": [], "pass": []}
        for color, arm in enumerate(arms):
            at = [[value / scale for value in progress(run.rows)] for run in arm.runs]
            lines["eval"] += _with_mean(
                arm.name, [_evaluations(*each) for each in zip(arm.runs, at, strict=True)], color
            )
            rewards = [_eval_rewards(*each) for each in zip(arm.runs, at, strict=True)]
            lines["reward"] += _with_mean(arm.name, rewards, color)
            lines["pass"] += _with_mean(arm.name, [_rollouts(*each) for each in zip(arm.runs, at, strict=True)], color)
        titles = {
            "eval": "Held-out Avg@k", "reward": "Reward on evaluation tasks", "pass": "Right rollouts, moving average",
        }  # fmt: skip
        for kind, title in titles.items():
            if lines[kind]:
                chart = Chart(title, tuple(lines[kind]), x_label=label, percent=kind != "reward")
                found.append((f"{kind}-{name}", chart))
    return found


Points = tuple[list[float], list[float]]


def _evaluations(run: Run, at: list[float]) -> Points:
    steps, values = evaluations(run, "avg_at_k")
    return _progress(run, at, steps), values


def _eval_rewards(run: Run, at: list[float]) -> Points:
    steps, values = series(run.eval_rows, "eval_reward")
    return _progress(run, at, steps), values


def _progress(run: Run, at: list[float], steps: list[float]) -> list[float]:
    """Return the tokens or the time at these steps; `at` has them at each logged step."""
    import numpy as np

    logged = [0.0, *(float(row["step"]) for row in run.rows)]
    found: list[float] = np.interp(np.asarray(steps), logged, [0.0, *at]).tolist()
    return found


def _rollouts(run: Run, at: list[float]) -> Points:
    # Without lessons, only the reward of the verifier is logged.
    every = (series(run.rows, name) for name in ("mel/pass_rate", "rewards/_verifier_reward/mean"))
    steps, rates = next((found for found in every if found[1]), ([], []))
    if not rates:
        return [], []
    return thinned(_progress(run, at, steps)), thinned(smoothed(rates, max(1, len(rates) // 10)))


def _with_mean(name: str, runs: list[Points], color: int) -> list[Line]:
    """Return a faint line for each run, and their mean in front, as far as all of them go."""
    import numpy as np

    runs = [(x, y) for x, y in runs if x]
    if len(runs) < 2:
        return [Line(name, x, y, color, marks=len(x) <= MARKED) for x, y in runs]
    start, end = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
    longest = max(runs, key=lambda run: len(run[0]))[0]
    grid = [start, *(x for x in longest if start < x < end), end] if start < end else [start]
    mean = np.mean([np.interp(grid, x, y) for x, y in runs], axis=0).tolist()
    faint = [Line("", x, y, color, faint=True) for x, y in runs]
    return [*faint, Line(name, grid, mean, color, marks=len(grid) <= MARKED)]
