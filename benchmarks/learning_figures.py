"""Tables of docs/learning.md from benchmarks/results/learning/: results and meta-experiences of every arm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mel_lite.report.statistics import interval, measures

RUNS = Path(__file__).resolve().parent / "results" / "learning"
REFERENCE = "grpo"
MAX_GRAD_NORM = 1.0
"""Default of the trainer, used by all runs."""
MEANINGS = {
    "grpo": "GRPO",
    "mel": "as in the paper: lambda 1, NLL of the whole analysis, kept when the replay is solved",
    "mel-quarter": "lambda 0.25",
    "mel-tenth": "lambda 0.1",
    "mel-uplift": "kept only if two replays with the meta-experience do better than two without",
    "mel-experience": "NLL of step, critique and heuristic alone",
    "mel-prompts": "NLL divided by the number of prompts, not of kept lessons",
    "mel-pairs": "two pairs per group",
    "mel-failed": "ablation: the meta-experiences whose replay failed, in place of those whose replay was right",
    "mel-replay": "NLL of the right replay as an answer to the plain question, in place of the analysis",
    "mel-both": "NLL of the analysis and of that answer",
    "mel-right": "ablation: NLL of the pair's right solution, which needed no meta-experience",
    "rft": "RFT",
    "rft-mel": "RFT with lessons",
}


def runs(folder: Path = RUNS) -> dict[str, list[dict[str, Any]]]:
    """Return the finished runs by arm, in the order of MEANINGS, with ascending seeds."""
    read = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return {arm: found for arm in MEANINGS if (found := [run for run in read if run["arm"] == arm])}


def figures(points: Sequence[dict[str, Any]], samples: int) -> dict[str, np.ndarray]:
    """Return Pass@1 (greedy), Avg@k and Pass@k with k = samples, each of shape (runs, prompts)."""
    greedy, right = ([point[name] for point in points] for name in ("greedy_right", "samples_right"))
    return measures(greedy, right, samples)


def _share(values_RP: np.ndarray) -> str:
    return interval(values_RP).as_share()


def _points(values_RP: np.ndarray) -> str:
    return interval(values_RP).as_points()


def setup() -> str:
    """Return the settings common to all runs."""
    first = next(iter(runs().values()))[0]
    plan, options = first["plan"], first["options"]
    batch = options["per_device_train_batch_size"]
    return (
        f"The {plan['model']} model, {plan['tokens']:,} generated tokens per run (rollouts, analyses and replays all "
        f"count), {batch} rollouts per step in groups of {options['num_generations']}, learning rate "
        f"{options['learning_rate']:g}; {plan['tasks']} held-out tasks, {plan['samples']} samples each at temperature "
        f"0.6. Torch {first['torch']}, {first['threads']} thread."
    )


def scan() -> str:
    """Return Avg@k over one run per learning rate and arm, on a seed that the study does not use."""
    found = runs(RUNS / "scan")
    rates = sorted({run["options"]["learning_rate"] for group in found.values() for run in group})
    lines = ["| learning rate | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for rate in rates:
        cells = []
        for group in found.values():
            run = next((run for run in group if run["options"]["learning_rate"] == rate), None)
            shares = figures(run["points"], run["plan"]["samples"])["avg_at_k"].mean(1) if run else []
            cells.append(" → ".join(f"{share:.1%}" for share in shares))
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share_at(run: dict[str, Any], step: int) -> float:
    """Return Avg@k of a run after `step` optimizer steps, interpolated linearly between its measurements."""
    shares = figures(run["points"], run["plan"]["samples"])["avg_at_k"].mean(1)
    return float(np.interp(step, [point["step"] for point in run["points"]], shares))


def results() -> str:
    """Return the three figures at the start and after every arm, and Avg@k against GRPO, paired by seed and prompt."""
    found = runs()
    samples = found[REFERENCE][0]["plan"]["samples"]
    reference = {run["seed"]: run for run in found[REFERENCE]}
    lines = [
        f"| | seeds | steps | Pass@1 | Avg@{samples} | Pass@{samples} | Avg@{samples} against GRPO, points | seeds "
        "above GRPO | at equal steps, points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    before = figures([found[REFERENCE][0]["points"][0]], samples)
    lines.append(f"| start | | 0 | {' | '.join(_share(before[name]) for name in before)} | | | |")
    for arm, group in found.items():
        after = figures([run["points"][-1] for run in group], samples)
        steps = round(sum(run["points"][-1]["step"] for run in group) / len(group))
        against = ahead = equal_steps = ""
        pairs = [(run, reference[run["seed"]]) for run in group if run["seed"] in reference]
        if arm != REFERENCE and pairs:
            one, other = (figures([pair[i]["points"][-1] for pair in pairs], samples)["avg_at_k"] for i in (0, 1))
            against = _points(one - other)
            ahead = f"{int(((one - other).mean(1) > 0).sum())} of {len(pairs)}"
            lead = [_share_at(run, run["points"][-1]["step"]) - _share_at(ref, run["points"][-1]["step"])
                    for run, ref in pairs]  # fmt: skip
            equal_steps = f"{100 * np.mean(lead):+.1f}"
        shares = " | ".join(_share(after[name]) for name in after)
        lines.append(f"| {arm} | {len(group)} | {steps} | {shares} | {against} | {ahead} | {equal_steps} |")
    meanings = [f"`{arm}`: {MEANINGS[arm]}" for arm in found]
    return "\n".join([*lines, "", "; ".join(meanings) + "."])


def line() -> str:
    """Compare GRPO and MEL as in the paper in two sentences."""
    found = runs()
    samples = found[REFERENCE][0]["plan"]["samples"]
    start, grpo, mel = (
        figures(points, samples)["avg_at_k"]
        for points in (
            [found[REFERENCE][0]["points"][0]],
            *([run["points"][-1] for run in sorted(found[arm], key=lambda r: r["seed"])] for arm in (REFERENCE, "mel")),
        )
    )
    assert [run["seed"] for run in found[REFERENCE]] == [run["seed"] for run in found["mel"]]
    lead = interval(grpo - mel)
    value, low, high = (100 * figure for figure in (lead.value, lead.low, lead.high))
    return (
        f"Avg@{samples} goes from {start.mean():.1%} to {grpo.mean():.1%} with GRPO and to {mel.mean():.1%} with MEL "
        f"as in the paper, over {len(grpo)} seeds. MEL ends {value:.1f} points [{low:.1f}, {high:.1f}] below plain "
        "GRPO."
    )


def halfway() -> str:
    """Return Avg@k of every arm at each measurement, averaged over its runs: the learning curve as a table."""
    found = runs()
    samples = found[REFERENCE][0]["plan"]["samples"]
    count = min(len(run["points"]) for group in found.values() for run in group)
    tokens = [round(np.mean([r["points"][i]["tokens"] for r in found[REFERENCE]]), -3) for i in range(count)]
    lines = ["| | " + " | ".join(f"{each:,.0f} tokens" for each in tokens) + " |", "|---|" + "---|" * count]
    for arm, group in found.items():
        shares = [figures([run["points"][i] for run in group], samples)["avg_at_k"].mean() for i in range(count)]
        lines.append(f"| {arm} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def _logged(group: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([step[name] for run in group for step in run["steps"] if name in step])


def lessons() -> str:
    """Return counts of meta-experiences, NLL and gradient norms of every arm, over all its steps."""
    lines = [
        "| | mixed groups | meta-experiences | parsed | kept | NLL before the update, nats | after | "
        "policy gradient, median norm | NLL gradient | cosine, mean [10 %, 90 %] | steps clipped |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, group in runs().items():
        policy = np.median(_logged(group, "mel/grad_norm_policy"))
        clipped = (_logged(group, "grad_norm") > MAX_GRAD_NORM).mean()
        written = _logged(group, "mel/written").sum()
        if not written:
            lines.append(f"| {arm} | | | | | | | {policy:.2f} | | | {clipped:.0%} |")
            continue
        mixed = _logged(group, "mel/mixed_groups").sum() / _logged(group, "mel/groups").sum()
        parsed, kept = (_logged(group, name).sum() / written for name in ("mel/parsed", "mel/replay_valid"))
        nll, nll_after = (_logged(group, name).mean() for name in ("mel/nll", "mel/nll_after"))
        nll_norm = np.median(_logged(group, "mel/grad_norm_nll"))
        cosine = _logged(group, "mel/grad_cosine")
        low, high = np.percentile(cosine, [10, 90])
        lines.append(
            f"| {arm} | {mixed:.0%} | {written:.0f} | {parsed:.0%} | {kept:.0%} | {nll:.3f} | {nll_after:.3f} | "
            f"{policy:.2f} | {nll_norm:.2f} | {cosine.mean():+.2f} [{low:+.2f}, {high:+.2f}] | {clipped:.0%} |"
        )
    return "\n".join(lines)


def held_out_lessons() -> str:
    """Return figures of meta-experiences on held-out tasks, at the start and at the end, without training on them."""
    found = runs()
    lines = [
        "| | analyses | parsed | retention (one replay) | solved with the meta-experience | without | "
        "points at the slip |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {"start": [found[REFERENCE][0]["points"][0]]}
    rows |= {arm: [run["points"][-1] for run in group] for arm, group in found.items()}
    for name, points in rows.items():
        each = [point["lessons"] for point in points]
        parsed, retention, points_right = (
            np.mean([one[key] for one in each]) for key in ("parsed", "retention_k1", "points_right")
        )
        count = sum(one["analyses"] for one in each)
        solved, without = (
            np.mean([float(one[key].split()[0]) for one in each if one[key] != "none"])
            for key in ("solved_with_lesson", "solved_without")
        )
        lines.append(
            f"| {name} | {count} | {parsed:.0%} | {retention:.0%} | {solved:.0%} | {without:.0%} | {points_right:.0%} |"
        )
    return "\n".join(lines)
