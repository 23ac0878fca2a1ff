"""Draw docs/learning.png from benchmarks/results/learning/ (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from learning_figures import REFERENCE, REGIMES, mean_avg, runs
from matplotlib import pyplot

PAGE = Path(__file__).resolve().parents[2] / "docs" / "learning.png"


def draw(axis: Any, regime: str) -> None:
    """Draw mean Avg@8 of every arm over generated tokens, with the range over seeds of the arms that have most."""
    found = runs(regime)
    most = max(len(group) for group in found.values())
    for arm, group in found.items():
        count = min(len(run["points"]) for run in group)
        tokens = np.mean([[point["tokens"] for point in run["points"][:count]] for run in group], axis=0) / 1000
        shares = np.array([[mean_avg(run, i) for run in group] for i in range(count)]) * 100
        style = {"linewidth": 2.5 if arm == REFERENCE else 1.2, "linestyle": "-" if len(group) == most else ":"}
        (line,) = axis.plot(tokens, shares.mean(1), marker="o", markersize=3, label=f"{arm} ({len(group)})", **style)
        if len(group) == most:
            axis.fill_between(tokens, shares.min(1), shares.max(1), alpha=0.12, color=line.get_color())
    axis.set(title=REGIMES[regime].capitalize(), xlabel="generated tokens, thousands", ylabel="Avg@8, held-out, %")
    axis.legend(fontsize=7, title="arm (seeds)")


def main() -> None:
    shown = [regime for regime in reversed(REGIMES) if runs(regime)]
    figure, axes = pyplot.subplots(len(shown) // 2, 2, figsize=(13, 4.6 * (len(shown) // 2)))
    for axis, regime in zip(axes.flat, shown, strict=True):
        draw(axis, regime)
    figure.tight_layout()
    figure.savefig(PAGE, dpi=110)


if __name__ == "__main__":
    main()
