"""Comparison of finished runs: arms, paired differences over tasks and seeds, and what can be concluded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mel_lite.errors import ConfigError
from mel_lite.report.charts import Chart, Line, smoothed, thinned
from mel_lite.report.page import flat
from mel_lite.report.runs import Run, generated_tokens, read_run, series, training_seconds
from mel_lite.report.statistics import Estimate, difference, interval, measures

if TYPE_CHECKING:
    import numpy as np

MEASURES = {"pass_at_1": "Pass@1", "avg_at_k": "Avg@{k}", "pass_at_k": "Pass@{k}"}
IGNORED = ("train.seed", "train.data_seed", "train.output_dir", "train.run_name", "train.max_steps")
"""Options that do not make another arm."""
FEW_SEEDS = 5
LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs with the same options but for their seeds."""

    name: str
    runs: tuple[Run, ...]
    """In the order of their seeds."""

    @property
    def seeds(self) -> list[Any]:
        """Seed of each run; None where its config is missing."""
        return [run.option("train.seed") for run in self.runs]

    @property
    def tokens(self) -> float:
        """Mean number of generated tokens of a run: rollouts, analyses and replays."""
        return sum((generated_tokens(run.rows) or [0.0])[-1] for run in self.runs) / len(self.runs)

    @property
    def seconds(self) -> float:
        """Mean seconds in the phases of the training steps."""
        return sum((training_seconds(run.rows) or [0.0])[-1] for run in self.runs) / len(self.runs)

    @property
    def steps(self) -> float:
        """Mean number of optimizer steps."""
        return sum(run.steps for run in self.runs) / len(self.runs)


@dataclass(frozen=True, slots=True)
class ArmResult:
    """Figures of an arm after training."""

    name: str
    folders: tuple[str, ...]
    seeds: tuple[Any, ...]
    steps: float
    tokens: float
    seconds: float
    after: dict[str, Estimate]
    """Pass@1, Avg@k and Pass@k over the tasks that all runs share; empty without evaluations."""
    difference: dict[str, Estimate]
    """The same minus those of the first arm; empty for the first arm."""
    paired_seeds: int
    """Number of seeds that both arms have; 0 = the runs are compared as independent ones."""
    seeds_ahead: int
    """Of these, how many end with a higher Avg@k."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arms, the first of which is the reference, and sentences on what follows."""

    arms: tuple[ArmResult, ...]
    tasks: int
    """Number of tasks that all runs were evaluated on."""
    samples: int
    conclusions: tuple[str, ...]
    limits: tuple[str, ...]
    """Limits of this comparison, with their reasons."""

    def to_json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps(asdict(self), indent=1)


def read_arms(folders: Sequence[Path]) -> list[Arm]:
    """Read runs and group those that differ in their seed alone, in the order given.

    Raises: ConfigError for fewer than two runs, the same folder twice, or a folder without a run.
    """
    if len(folders) < 2:
        raise ConfigError("compare needs at least two runs, or --arms to train some. Pass the folders of two runs.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("compare: a run is named twice. Pass each folder once.")
    return group([read_run(folder) for folder in folders])


def group(runs: Sequence[Run]) -> list[Arm]:
    """Group runs by their options, ignoring seeds. A run without config.yaml is an arm of its own."""
    options = [
        {k: v for k, v in flat(run.config).items() if k not in IGNORED} if run.config else {"folder": str(run.folder)}
        for run in runs
    ]
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run, found in zip(runs, options, strict=True):
        same = next((each for known, each in groups if known == found), None)
        if same is None:
            groups.append((found, [run]))
        else:
            same.append(run)
    names = _names([known for known, _ in groups], [each[0].name for _, each in groups])
    return [
        Arm(name, tuple(sorted(each, key=lambda run: str(run.option("train.seed")))))
        for name, (_, each) in zip(names, groups, strict=True)
    ]


def _names(options: list[dict[str, Any]], folders: list[str]) -> list[str]:
    """Name each arm by the options in which the arms differ, or by a folder where these are too many."""
    differing = [key for key in dict.fromkeys(key for each in options for key in each)
                 if len({json.dumps(each.get(key), default=str) for each in options}) > 1]  # fmt: skip
    names = []
    for each, folder in zip(options, folders, strict=True):
        parts = [f"{key.rpartition('.')[2]}={each[key]}" for key in differing if key in each]
        parts = [part.removeprefix("algorithm=") for part in parts]
        name = ", ".join(parts)
        names.append(name if 0 < len(name) <= LONGEST_NAME else folder)
    return names if len(set(names)) == len(names) else folders


def compare(arms: Sequence[Arm], *, left_out: Sequence[str] = ()) -> Comparison:
    """Compare the final evaluations of all arms with those of the first one.

    `left_out`: sentences on runs that belong to the arms and are missing.
    """
    tasks, samples, problem = _shared_tasks(arms)
    values = [_values(arm, tasks, samples) for arm in arms] if tasks else [{} for _ in arms]
    results = tuple(
        _result(arm, each, arms[0], values[0] if i else None)
        for i, (arm, each) in enumerate(zip(arms, values, strict=True))
    )
    found = Comparison(results, len(tasks), samples, (), ())
    return Comparison(results, len(tasks), samples, _conclusions(found), (*problem, *left_out, *_limits(found, arms)))


def _shared_tasks(arms: Sequence[Arm]) -> tuple[list[str], int, tuple[str, ...]]:
    """Return the tasks that every run was evaluated on, the samples per task, and why there are none."""
    runs = [run for arm in arms for run in arm.runs]
    without = [run.name for run in runs if run.after is None]
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


def _conclusions(found: Comparison) -> tuple[str, ...]:
    """Return one sentence on each arm against the first."""
    sentences = []
    for arm in found.arms[1:]:
        lead = arm.difference.get("avg_at_k")
        if lead is None:
            continue
        span = f"{abs(100 * lead.value):.1f} points [{100 * lead.low:+.1f}, {100 * lead.high:+.1f}]"
        first = found.arms[0].name
        if not lead.excludes_zero:
            sentence = (
                f"{arm.name} and {first} cannot be told apart: the difference in Avg@{found.samples} is "
                f"{lead.as_points()} points, and its interval contains 0."
            )
        elif lead.value > 0:
            sentence = f"{arm.name} ends {span} above {first} in Avg@{found.samples}."
        else:
            sentence = f"{arm.name} ends {span} below {first} in Avg@{found.samples}."
        if arm.paired_seeds > 1:
            sentence += f" It is ahead on {arm.seeds_ahead} of {arm.paired_seeds} seeds."
        sentences.append(sentence)
    return tuple(sentences)


def _limits(found: Comparison, arms: Sequence[Arm]) -> tuple[str, ...]:
    """Return what keeps the comparison from showing more."""
    limits = []
    fewest = min(len(arm.runs) for arm in arms)
    if found.tasks and fewest == 1:
        limits.append(
            "At least one arm is a single run. The intervals cover the choice of tasks and not the luck of training: "
            "with another seed the order can be different. Train each arm with several seeds."
        )
    elif found.tasks and fewest < FEW_SEEDS:
        limits.append(
            f"With {fewest} seeds per arm the intervals are narrower than they should be. The number of seeds ahead is "
            "the more robust figure."
        )
    if found.tasks and any(not arm.paired_seeds for arm in found.arms[1:]):
        limits.append("The arms do not have the same seeds, so runs are not compared seed by seed.")
    tokens = [arm.tokens for arm in found.arms]
    if min(tokens) < 0.95 * max(tokens):
        each = ", ".join(f"{arm.name} {arm.tokens:,.0f}" for arm in found.arms)
        limits.append(f"The arms did not generate equally many tokens ({each}), so they did not cost the same.")
    for arm in arms:
        limits += [f"{run.name} has not finished ({run.steps} steps)." for run in arm.runs if not run.finished]
    if found.tasks and _begin_differently(arms):
        limits.append("Runs of one seed answered differently before training: they began with different models.")
    if len(found.arms) > 2 and found.tasks:
        limits.append(f"{len(found.arms) - 1} arms are compared with one: the more arms, the likelier a lucky one.")
    return tuple(limits)


def _begin_differently(arms: Sequence[Arm]) -> bool:
    """Return True when two runs of one seed, from which the evaluation draws, have different scores at the start."""
    starts: dict[Any, set[Any]] = {}
    for run in (run for arm in arms for run in arm.runs):
        if run.before is not None:
            starts.setdefault(run.option("train.seed"), set()).add(run.before.scores)
    return any(len(scores) > 1 for scores in starts.values())


def charts(arms: Sequence[Arm]) -> list[tuple[str, Chart]]:
    """Return the learning curves: evaluations and rollouts over generated tokens and over training time."""
    axes = {
        "tokens": ("generated tokens, thousands", 1000.0, generated_tokens),
        "time": ("training time, minutes", 60.0, training_seconds),
    }
    found = []
    for name, (label, scale, progress) in axes.items():
        lines: dict[str, list[Line]] = {"eval": [], "pass": []}
        for color, arm in enumerate(arms):
            at = [[value / scale for value in progress(run.rows)] for run in arm.runs]
            lines["eval"] += _with_mean(
                arm.name, [_evaluations(*each) for each in zip(arm.runs, at, strict=True)], color
            )
            lines["pass"] += _with_mean(arm.name, [_rollouts(*each) for each in zip(arm.runs, at, strict=True)], color)
        titles = {"eval": "Held-out Avg@k, before and after", "pass": "Right rollouts, moving average"}
        for kind, title in titles.items():
            if lines[kind]:
                found.append((f"{kind}-{name}", Chart(title, tuple(lines[kind]), x_label=label, percent=True)))
    return found


Points = tuple[list[float], list[float]]


def _evaluations(run: Run, at: list[float]) -> Points:
    results = [(0.0, run.before), (at[-1] if at else 0.0, run.after)]
    points = [(x, result.avg_at_k.value) for x, result in results if result is not None]
    return [x for x, _ in points], [y for _, y in points]


def _rollouts(run: Run, at: list[float]) -> Points:
    _, rates = series(run.rows, "mel/pass_rate")
    if len(rates) != len(at):
        return [], []
    return thinned(at), thinned(smoothed(rates, max(1, len(rates) // 10)))


def _with_mean(name: str, runs: list[Points], color: int) -> list[Line]:
    """Return a faint line for each run, and their mean in front, as far as all of them go."""
    import numpy as np

    runs = [(x, y) for x, y in runs if x]
    if len(runs) < 2:
        return [Line(name, x, y, color, marks=len(x) < 3) for x, y in runs]
    start, end = max(x[0] for x, _ in runs), min(x[-1] for x, _ in runs)
    longest = max(runs, key=lambda run: len(run[0]))[0]
    grid = [start, *(x for x in longest if start < x < end), end] if start < end else [start]
    mean = np.mean([np.interp(grid, x, y) for x, y in runs], axis=0).tolist()
    return [*(Line("", x, y, color, faint=True) for x, y in runs), Line(name, grid, mean, color, marks=len(grid) < 3)]


def names_of(found: Comparison) -> dict[str, str]:
    """Return the measures' names for readers."""
    return {name: text.format(k=found.samples) for name, text in MEASURES.items()}
