"""Tables of docs/learning.md from the runs in benchmarks/results/learning/: what every arm reached, and its lessons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RUNS = Path(__file__).resolve().parent / "results" / "learning"
RESAMPLES = 10_000
REFERENCE = "grpo"
MEANINGS = {
    "grpo": "GRPO",
    "mel": "MEL as in the paper: lambda 1, NLL of the whole analysis, kept when the replay is solved",
    "mel-quarter": "lambda 0.25",
    "mel-prompts": "NLL divided by the number of prompts, not of kept lessons",
    "mel-experience": "NLL of step, critique and heuristic alone",
    "mel-uplift": "kept only if replays with the lesson do better than without, 2 attempts each",
    "mel-uplift-prompts": "kept on uplift, and NLL divided by the number of prompts",
    "mel-slow": "both terms, half the learning rate",
    "rft": "RFT",
    "rft-mel": "RFT with lessons",
    "reinforce++": "REINFORCE++",
    "reinforce++-mel": "REINFORCE++ with lessons",
}


def runs(folder: Path = RUNS) -> dict[str, list[dict[str, Any]]]:
    """Finished runs by arm, in the order of MEANINGS, seeds ascending."""
    read = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return {arm: found for arm in MEANINGS if (found := [run for run in read if run["arm"] == arm])}


def pass_at_k(right: np.ndarray, samples: int) -> np.ndarray:
    """Whether any of the k = samples answers is right."""
    return (right > 0).astype(float)


def figures(points: Sequence[dict[str, Any]], samples: int) -> dict[str, np.ndarray]:
    """Pass@1, Avg@k and Pass@k of every prompt, averaged over runs: (prompts,) each."""
    right = np.array([point["samples_right"] for point in points])
    greedy = np.array([point["greedy_right"] for point in points], dtype=float)
    return {
        "pass_at_1": greedy.mean(0),
        "avg_at_k": (right / samples).mean(0),
        "pass_at_k": pass_at_k(right, samples).mean(0),
    }


def interval(per_prompt: np.ndarray) -> tuple[float, float, float]:
    """Mean over prompts and its 95 % percentile bootstrap interval; the prompts are resampled, the runs are not."""
    picks = np.random.default_rng(0).integers(len(per_prompt), size=(RESAMPLES, len(per_prompt)))
    low, high = np.percentile(per_prompt[picks].mean(1), [2.5, 97.5])
    return float(per_prompt.mean()), float(low), float(high)


def _share(per_prompt: np.ndarray) -> str:
    value, low, high = interval(per_prompt)
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"


def _points(per_prompt: np.ndarray) -> str:
    value, low, high = (100 * figure for figure in interval(per_prompt))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def setup() -> str:
    """What all runs have in common."""
    first = next(iter(runs().values()))[0]
    plan, options = first["plan"], first["options"]
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    return (
        f"Demo model ({plan['dtype']}, LoRA rank 8) from its warm start, {plan['tokens']:,} generated tokens per run "
        f"(rollouts, analyses and replays all count), {batch} rollouts per step in groups of "
        f"{options['num_generations']}, learning rate {options['learning_rate']:g}; {plan['tasks']} held-out tasks, "
        f"{plan['samples']} samples each. Torch {first['torch']}, {first['threads']} thread."
    )


def results() -> str:
    """Before, and after every arm: the three figures, and Avg@k against GRPO prompt by prompt."""
    found = runs()
    samples = found[REFERENCE][0]["plan"]["samples"]
    shared = sorted(run["seed"] for run in found[REFERENCE])
    lines = [
        f"| | seeds | steps | Pass@1 | Avg@{samples} | Pass@{samples} | Avg@{samples} against GRPO on the same seeds, "
        "points |",
        "|---|---|---|---|---|---|---|",
    ]
    before = figures([found[REFERENCE][0]["points"][0]], samples)
    lines.append(f"| warm start | | 0 | {' | '.join(_share(before[name]) for name in before)} | |")
    for arm, group in found.items():
        after = figures([run["points"][-1] for run in group], samples)
        steps = " ".join(str(run["points"][-1]["step"]) for run in group)
        seeds = {run["seed"] for run in group}
        against = ""
        if arm != REFERENCE and seeds <= set(shared):
            twins = [run["points"][-1] for run in found[REFERENCE] if run["seed"] in seeds]
            against = _points(after["avg_at_k"] - figures(twins, samples)["avg_at_k"])
        lines.append(
            f"| {arm} | {len(group)} | {steps} | {' | '.join(_share(after[name]) for name in after)} | {against} |"
        )
    meanings = [f"`{arm}`: {MEANINGS[arm]}" for arm in found]
    return "\n".join([*lines, "", "; ".join(meanings) + "."])


def _logged(group: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([step[name] for run in group for step in run["steps"] if name in step])


def lessons() -> str:
    """What happened to the lessons of every arm that writes them."""
    lines = [
        "| | pairs | parsed | kept | retention | uplift, points | NLL before, nats | after | policy gradient, median "
        "norm | NLL gradient | cosine |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, group in runs().items():
        pairs, kept = (_logged(group, name).sum() for name in ("mel/mixed_groups", "mel/replay_valid"))
        if not len(_logged(group, "mel/parsed")) or "mel" not in arm:
            continue
        norms = [_logged(group, f"mel/grad_{name}") for name in ("norm_policy", "norm_nll", "cosine")]
        medians = [f"{np.median(norm):.3f}" if len(norm) else "" for norm in norms]
        lines.append(
            f"| {arm} | {pairs:.0f} | {_logged(group, 'mel/parsed').sum():.0f} | {kept:.0f} | "
            f"{kept / max(1, pairs):.0%} | {100 * _logged(group, 'mel/replay_uplift').mean():+.1f} | "
            f"{_logged(group, 'mel/nll').mean():.3f} | {_logged(group, 'mel/nll_after').mean():.3f} | "
            f"{' | '.join(medians)} |"
        )
    return "\n".join(lines)
