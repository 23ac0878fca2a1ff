"""Charts, tables and sentences of one run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mel_lite.intervals import Estimate, share_of_tasks
from mel_lite.report.charts import Chart, Line, thinned, trend
from mel_lite.report.runs import Row, Run, evaluations, phase_seconds, series, step_counts
from mel_lite.report.statistics import interval, measures

if TYPE_CHECKING:
    from mel_lite.evaluate import EvalResult

FUNNEL = {
    "groups": "groups of rollouts",
    "mixed_groups": "with right and wrong ones",
    "pairs": "pairs chosen",
    "written": "analyses written",
    "parsed": "parsed",
    "leak_free": "without the answer",
    "replay_valid": "kept",
}
"""Stage of the funnel -> its name for readers."""
PHASES = {
    "rollout": "sampling rollouts",
    "verify": "verifying answers",
    "probe": "checking the engine",
    "analysis": "writing analyses",
    "replay": "replaying",
    "scored": "scoring new lessons",
    "forks": "checking which forks are settled",
    "examine": "examining lessons of the bank",
    "internalise": "reading rollouts with notes",
    "scoring": "scoring rollouts",
    "update": "updating the weights",
    "rescore": "scoring lessons after their update",
    "optimizer": "stepping the optimizer",
    "checkpoint": "writing checkpoints",
}
SPANS = {"min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure before and after training, on the same tasks."""

    name: str
    before: Estimate
    after: Estimate
    change: Estimate | None
    """Paired difference; None when the two evaluations do not have the same tasks and samples."""


def evaluation(before: EvalResult | None, after: EvalResult | None) -> tuple[list[Measure], str]:
    """Return Pass@1, Avg@k and Pass@k before and after, and a warning; nothing unless both were measured."""
    if before is None or after is None:
        return [], ""
    scores = [{score.prompt_hash: score for score in result.scores} for result in (before, after)]
    common = [key for key in scores[0] if key in scores[1]]
    warning = ""
    if before.samples != after.samples or not common:
        warning = "The evaluations before and after do not have the same tasks and samples. No difference is computed."
    elif len(common) < max(map(len, scores)):
        warning = f"Only the {len(common)} tasks that both evaluations judged are compared."
    names = {"pass_at_1": "Pass@1 (greedy)", "avg_at_k": f"Avg@{after.samples}", "pass_at_k": f"Pass@{after.samples}"}
    found = []
    paired = bool(common) and before.samples == after.samples
    keys = [common, common] if paired else [list(each) for each in scores]
    values = [
        measures(
            [[of[key].greedy_right for key in each]], [[of[key].samples_right for key in each]], result.samples
        )
        for of, each, result in zip(scores, keys, (before, after), strict=True)
    ]  # fmt: skip
    for key, name in names.items():
        samples = after.samples if key == "avg_at_k" else 1
        shares = [share_of_tasks(of[key][0].tolist(), samples) for of in values]
        change = interval(values[1][key] - values[0][key]) if paired else None
        found.append(Measure(name, shares[0], shares[1], change))
    return found, warning


def headline(run: Run, found: Sequence[Measure]) -> tuple[str, str]:
    """Return the run's result in a short line, and what can be concluded from it in a sentence."""
    if found:
        main = found[1]
        line = f"{main.name}: {main.before.value:.1%} → {main.after.value:.1%}"
        if main.change is None:
            return line, "The two evaluations cannot be compared task by task."
        tasks = len(run.after.scores) if run.after else 0
        span = f"{main.change.as_points()} points on {tasks} held-out tasks, paired"
        if not main.change.excludes_zero:
            return line, f"{span}. The interval contains 0: this evaluation shows no difference."
        direction = "better" if main.change.value > 0 else "worse"
        return line, f"{span}. After training the model is {direction} on such tasks; another seed may differ."
    if not run.rows:
        return "No step was logged yet", "There is nothing to show so far."
    _, rates = series(run.rows, "mel/pass_rate" if series(run.rows, "mel/pass_rate")[1] else "reward")
    if not rates:
        return "No reward was logged", "There is no evaluation before and after, and no reward of rollouts."
    part = max(1, len(rates) // 5)
    first, last = sum(rates[:part]) / part, sum(rates[-part:]) / part
    missing = "There is no evaluation before and after on held-out tasks"
    line = f"Rollouts: {first:.1%} → {last:.1%} right" if series(run.rows, "mel/pass_rate")[1] else (
        f"Reward: {first:.3g} → {last:.3g}"
    )  # fmt: skip
    compared = f"Mean of the first and the last {part} steps" if part > 1 else "First and last step"
    note = f"{compared}, on different tasks. {missing}, so this is no test."
    return line, note if run.finished else f"{note} The run has not finished."


def uplift(run: Run) -> Estimate | None:
    """Return the mean of (solved with the lesson - solved without) over replayed lessons with a control."""
    import numpy as np

    found = [row.uplift for row in run.lessons if row.uplift is not None]
    return interval(np.array([found])) if found else None


def charts(run: Run) -> list[tuple[str, Chart]]:
    """Return the charts for which the run logged anything, by name."""
    rows = run.rows

    def of(title: str, names: dict[str, str], **options: Any) -> Chart | None:
        lines: list[Line] = []
        for label, name in names.items():
            x, y = series(rows, name)
            if y:
                color = len({line.color for line in lines})
                lines += trend(label if len(names) > 1 else "", x, y, color)
        return Chart(title, tuple(lines), **options) if lines else None

    every = {
        "pass": of("Right rollouts", {"": "mel/pass_rate"}, percent=True)
        or of("Right rollouts", {"": "rewards/_verifier_reward/mean"}, percent=True),
        "reward": None if _is_pass_rate(rows) else of("Reward of rollouts", {"": "reward"}),
        "evaluation": _evaluation_chart(run),
        "eval_reward": _eval_reward_chart(run),
        "policy": of("Policy loss", {"": "mel/policy_loss"}, zero=True) or of("Loss", {"": "loss"}, zero=True),
        "nll": of("Lessons: NLL of their update", {"before": "mel/nll", "after": "mel/nll_after"},
                  y_label="nats per token"),
        "norms": of("Gradient norms", {"policy": "mel/grad_norm_policy", "lessons": "mel/grad_norm_nll"})
        or of("Gradient norm", {"": "grad_norm"}),
        "cosine": of("Cosine of both gradients", {"": "mel/grad_cosine"}, zero=True),
        "entropy": of("Entropy", {"": "entropy"}, y_label="nats per token"),
        "length": of("Completion length", {"mean": "completions/mean_length", "longest": "completions/max_length"},
                     y_label="tokens"),
        "truncated": of("Truncated completions", {"": "completions/clipped_ratio"}, percent=True),
        "memory": of("Peak memory so far", {"": "mel/peak_memory_gib"}, y_label="GiB"),
        "speed": of("Generation", {"": "mel/tokens_per_s"}, y_label="tokens per second"),
        "funnel": _funnel_chart(rows),
        "retention": of("Lessons: kept, and their effect",
                        {"kept / written": "mel/retention_ratio", "uplift over resampling": "mel/replay_uplift"},
                        percent=True, zero=True),
        "lift": of("Lessons lift right over wrong rollouts",
                   {"scored proof": "mel/score_shift", "teacher": "mel/teacher_shift"}, y_label="nats", zero=True),
        "time": _time_chart(rows),
    }  # fmt: skip
    return [(name, chart) for name, chart in every.items() if chart is not None]


def _is_pass_rate(rows: Sequence[Row]) -> bool:
    """Return True when the reward is 1 for a right rollout and 0 for any other, so that one chart is enough."""
    return series(rows, "reward") == series(rows, "mel/pass_rate")


def _evaluation_chart(run: Run) -> Chart | None:
    """Return the held-out figures over the steps, if some were measured during training."""
    if not series(run.eval_rows, "eval_avg_at_k")[1]:
        return None
    names = {"Avg@k": "avg_at_k", "Pass@1": "pass_at_1", "Pass@k": "pass_at_k"}
    lines = (Line(label, *evaluations(run, name), i, marks=True) for i, (label, name) in enumerate(names.items()))
    return Chart("Held-out tasks", tuple(lines), percent=True)


def _eval_reward_chart(run: Run) -> Chart | None:
    x, y = series(run.eval_rows, "eval_reward")
    if not y:
        return None
    return Chart("Reward on evaluation tasks", trend("", x, y))


def _binned(rows: Sequence[Row], name: str) -> list[float]:
    return thinned([float(row.get(name) or 0.0) for row in rows])


def _funnel_chart(rows: Sequence[Row]) -> Chart | None:
    rows = [row for row in rows if "mel/groups" in row]
    if not rows:
        return None
    x = thinned([float(row["step"]) for row in rows])
    stages = [stage for stage in FUNNEL if stage not in ("pairs", "written")]
    lines = tuple(Line(FUNNEL[stage], x, _binned(rows, f"mel/{stage}"), i) for i, stage in enumerate(stages))
    return Chart("Funnel, per step", lines, y_label="count")


def _time_chart(rows: Sequence[Row]) -> Chart | None:
    totals = phase_seconds(rows)
    if not totals or len(rows) < 2:
        return None
    x = thinned([float(row["step"]) for row in rows])
    large = sorted(totals, key=lambda phase: -totals[phase])[:5]
    lines = [Line(PHASES.get(phase, phase), x, _binned(rows, f"time/{phase}_s"), i) for i, phase in enumerate(large)]
    return Chart("Time of a step", tuple(lines), y_label="seconds", stacked=True)


def funnel_table(run: Run) -> list[tuple[str, int, float | None]]:
    """Return name, count over the run, and share of the stage before, for each stage of the funnel."""
    per_batch = _updates_per_batch(run)
    weighted = [
        (row, max(1.0, count / per_batch))
        for row, count in zip(run.rows, step_counts(run.rows), strict=True)
        if "mel/groups" in row
    ]
    table: list[tuple[str, int, float | None]] = []
    for stage, name in FUNNEL.items():
        count = round(sum(weight * (row.get(f"mel/{stage}") or 0) for row, weight in weighted))
        share = count / table[-1][1] if table and table[-1][1] else None
        table.append((name, count, share))
    return table if weighted else []


def quoted(run: Run) -> tuple[int, int] | None:
    """Return how many parsed lessons quote a step of the wrong solution, of how many; None where it was not counted."""
    if not any("mel/quoted" in row for row in run.rows):
        return None
    parsed = [row for row in run.lessons if row.heuristic is not None]
    return (sum(row.quote_start is not None for row in parsed), len(parsed)) if parsed else None


def _updates_per_batch(run: Run) -> float:
    """Return the number of optimizer steps that share one generation batch."""
    accumulated = run.option("train.gradient_accumulation_steps") or 1
    generated = run.option("train.steps_per_generation") or accumulated
    return max(1.0, generated / accumulated * (run.option("train.num_iterations") or 1))


def duration(seconds: float) -> str:
    """Return seconds as text with the unit that fits, such as `42 s`, `7.5 min` or `3.2 h`."""
    for unit, size in reversed(SPANS.items()):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
