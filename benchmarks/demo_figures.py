"""Figures of the 135M demo: its warm start before any RL (results/demo-warmup*.json), and its arms."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mel_lite.report.statistics import Estimate

RESULTS = Path(__file__).resolve().parent / "results"
NOT_RUN = "Not run yet."
SAMPLES = 8
"""Per task, in the study's measurements."""


def _read(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _estimate(text: str) -> Estimate:
    """Read `+0.445 [+0.367, +0.523]`."""
    return Estimate(*(float(part.strip("[],")) for part in text.split()))


def pooled(reports: Sequence[dict[str, Any]]) -> tuple[int, Estimate]:
    """Return the number of lessons of independent measurements, and their mean uplift with its 95 % interval.

    With weights w_i = n_i / n, the mean is sum w_i m_i, and its lower error is sqrt(sum (w_i (m_i - low_i))^2).
    """
    counts = [report["figures"]["replayed_lessons"] for report in reports]
    found = [_estimate(report["figures"]["uplift"]) for report in reports]
    weights = [count / sum(counts) for count in counts]
    mean = sum(weight * each.value for weight, each in zip(weights, found, strict=True))
    below, above = (
        math.hypot(*(weight * (each.value - bound) for weight, each, bound in zip(weights, found, bounds, strict=True)))
        for bounds in ([each.low for each in found], [each.high for each in found])
    )
    return sum(counts), Estimate(mean, mean - below, mean + above)


def _uplifts(reports: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the solved shares and uplifts of each measurement, and of all of them."""
    rows = []
    for report in reports:
        found = report["figures"]
        where = f"{found['replayed_lessons']} lessons x {found['attempts_each']} on `{report['conditions']['tasks']}`"
        shares = [_estimate(found[name]).value for name in ("solved_with_lesson", "solved_without")]
        rows.append((f"{where}: solved with the lesson / without", " / ".join(f"{share:.0%}" for share in shares)))
        rows.append(("the same: uplift over resampling, points", _estimate(found["uplift"]).as_points()))
    lessons, uplift = pooled(reports)
    return [*rows, (f"**all {lessons} lessons: uplift over resampling, points**", f"**{uplift.as_points()}**")]


def warmup() -> str:
    """Return what the warm-started demo does before any RL: on training tasks, and the uplift on test tasks, too."""
    reports = [report for report in map(_read, ("demo-warmup", "demo-warmup-test")) if report is not None]
    if not reports:
        return NOT_RUN
    found, given = reports[0]["figures"], reports[0]["conditions"]
    made, notes = given["made_pairs"], given["made_notes"]
    rows = [
        (f"pass rate, sampled at temperature {given['temperature']:g} ({found['rollouts']} rollouts)", "pass_rate"),
        ("lines that are miscounted, which no lesson repairs", "miscounted_lines"),
        (f"groups of {given['group']} with a right and a wrong answer, of {found['prompts']}", "mixed_groups"),
        (f"analyses that parse, of {found['analyses']}", "parsed"),
        ("parsed analyses that quote a line of the wrong solution", "quoted_of_parsed"),
        ("parsed analyses that leak the answer", "leaked_of_parsed"),
        (f"{made} made pairs of another seed, analyzed greedily: wrong line quoted exactly", "points_right"),
        ("the same: right rule", "rule_right"),
        ("the same: parsed", "made_parsed"),
        (f"{notes} made notes with random rules: words read as noted, greedily", "obeyed"),
        ("the same, for rules that are wrong", "obeyed_wrong"),
        ("the same words without the notes", "obeyed_without_notes"),
    ]
    shown = [(words, f"{found[key]:.0%}") for words, key in rows] + _uplifts(reports)
    return "\n".join(["| figure | value |", "|---|---|", *(f"| {words} | {value} |" for words, value in shown)])


def arms() -> str:
    """Return the demo's arms after training, each against GRPO, paired by seed and task."""
    report = _read("learning/demo")
    if report is None:
        return NOT_RUN
    starts = [report["runs"][name]["before"] for name in report["arms"][0]["folders"]]
    lines = [
        "| arm | steps | generated tokens | Avg@4 | by seed | minus GRPO, points | seeds ahead |",
        "|---|---|---|---|---|---|---|",
        f"| start | | | {statistics.mean(starts):.1%} | {', '.join(f'{each:.1%}' for each in starts)} | | |",
    ]
    for arm in report["arms"]:
        after = Estimate(**arm["after"]["avg_at_k"])
        against = ["", ""]
        if arm["difference"]:
            shift = Estimate(**arm["difference"]["avg_at_k"]).as_points()
            against = [shift, f"{arm['seeds_ahead']} of {arm['paired_seeds']}"]
        each = ", ".join(f"{report['runs'][name]['after']:.1%}" for name in arm["folders"])
        figures = f"{arm['steps']:.0f} | {arm['tokens']:,.0f} | {after.value:.1%} | {each}"
        lines.append(f"| `{arm['name']}` | {figures} | {' | '.join(against)} |")
    return "\n".join(lines)


def tuning() -> str:
    """Return GRPO on the demo with more updates per batch: one seed, held-out training tasks."""
    report = _read("learning/demo-tuning")
    if report is None:
        return NOT_RUN
    lines = [
        "| updates per batch | learning rate | batches | reward, first and last three batches | entropy of the last | "
        "tokens clipped | Avg@4: start → end |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in report:
        first, last = (statistics.mean(part) for part in (run["reward"][:3], run["reward"][-3:]))
        before, after = (Estimate(**run[side]) for side in ("before", "after"))
        lines.append(
            f"| {run['num_iterations']} | {run['learning_rate']:g} | {len(run['reward'])} | {first:.2f} → {last:.2f} | "
            f"{run['entropy'][-1]:.2f} | {run['clipped']:.1%} | {before.value:.1%} → {after.value:.1%} |"
        )
    return "\n".join(lines)


def updates() -> str:
    """Return in a sentence what more updates per batch are worth to GRPO, on one tuning seed of each model."""
    report, folder = _read("learning/demo-tuning"), RESULTS / "learning" / "starved" / "tune"
    if report is None:
        return NOT_RUN
    ends = {run["num_iterations"]: run["after"]["value"] for run in report}
    study = []
    for setting in ("num_iterations=1,learning_rate=0.0003", "num_iterations=4,learning_rate=0.0001"):
        run = json.loads((folder / f"grpo,{setting}-100.json").read_text(encoding="utf-8"))
        right = run["points"][-1]["tune"]["samples_right"]
        study.append(statistics.mean(right) / SAMPLES)
    return (
        "With four updates per batch in place of one and a lower learning rate, GRPO ends at "
        f"{study[1]:.1%} in place of {study[0]:.1%} on the small model where reward is starved, and at "
        f"{ends[4]:.1%} in place of {ends[1]:.1%} on the 135M demo, for the same generated tokens (one seed each)."
    )
