"""Draw docs/learning.png from benchmarks/results/learning/ (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

import learning_figures

PAGE = Path(__file__).resolve().parent.parent / "docs" / "learning.png"


def _curves(axis: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
    for color, (arm, group) in enumerate(runs.items()):
        samples = group[0]["plan"]["samples"]
        count = min(len(run["points"]) for run in group)
        shares = np.array(
            [learning_figures.figures(run["points"][:count], samples)["avg_at_k"].mean(1) for run in group]
        )
        tokens = np.mean([[point["tokens"] for point in run["points"][:count]] for run in group], axis=0) / 1000
        style = {"color": f"C{color % 10}", "linestyle": "-" if color < 10 else "--"}
        axis.plot(tokens, 100 * shares.mean(0), marker="o", markersize=3, label=f"{arm} ({len(group)})", **style)
        if arm in ("grpo", "mel"):
            axis.fill_between(tokens, 100 * shares.min(0), 100 * shares.max(0), alpha=0.15, **style)
    axis.set(title="Held-out Avg@8: mean over seeds (their number)\nband: least to most, grpo and mel", ylabel="%")


def _smoothed(runs: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return bin centers in thousands of tokens, and the mean of a logged figure over all runs, in ten bins."""
    pairs = np.array([(step["tokens"], step[name]) for run in runs for step in run["steps"] if name in step])
    edges = np.linspace(0, pairs[:, 0].max() + 1, 11)
    which = np.digitize(pairs[:, 0], edges)
    filled = [b for b in range(1, 11) if (which == b).any()]
    middles = np.array([(edges[b - 1] + edges[b]) / 2000 for b in filled])
    return middles, np.array([pairs[which == b, 1].mean() for b in filled])


def _lessons(axis: Any, runs: list[dict[str, Any]]) -> None:
    for name, label in (("reward", "pass rate of rollouts"), ("mel/replay_solved", "replays right")):
        tokens, values = _smoothed(runs, name)
        axis.plot(tokens, 100 * values, label=label)
    steps = [step | {"kept": step["mel/replay_valid"] / step["mel/written"]} for run in runs for step in run["steps"]
             if step.get("mel/written")]  # fmt: skip
    tokens, values = _smoothed([{"steps": steps}], "kept")
    axis.plot(tokens, 100 * values, label="retention (kept / written)")
    measured = list(zip(*(run["points"] for run in runs), strict=False))
    tokens = np.array([np.mean([point["tokens"] for point in points]) / 1000 for points in measured])
    uplifts = [[point["lessons"]["uplift"].split()[0] for point in points] for points in measured]
    values = np.array([np.mean([float(uplift) for uplift in each if uplift != "none"]) for each in uplifts])
    axis.plot(tokens, 100 * values, marker="o", markersize=3, label="uplift, held-out tasks (points)")
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set(title="Lessons of arm mel", ylabel="%")


def _gradients(axis: Any, runs: list[dict[str, Any]]) -> None:
    for name, label in (
        ("mel/grad_norm_policy", "norm of the policy term's gradient"),
        ("mel/grad_norm_nll", "norm of the NLL term's gradient"),
        ("mel/grad_cosine", "cosine of the two"),
    ):
        tokens, values = _smoothed(runs, name)
        axis.plot(tokens, values, label=label)
    axis.axhline(0, color="grey", linewidth=0.5)
    axis.set(title="Gradients of arm mel", ylabel="norm before clipping, cosine")


def main() -> None:
    runs = learning_figures.runs()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6))
    _curves(axes[0], runs)
    _lessons(axes[1], runs["mel"])
    _gradients(axes[2], runs["mel"])
    for axis in axes:
        axis.set_xlabel("generated tokens, thousands")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PAGE, dpi=110)


if __name__ == "__main__":
    main()
