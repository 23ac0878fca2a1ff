"""Files and tables of a comparison: comparison.html, comparison.png, comparison.json and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mel_lite.files import atomic_write_text, replacing
from mel_lite.report import charts
from mel_lite.report.arms import Arm, Comparison, names_of
from mel_lite.report.compare import charts as curves
from mel_lite.report.figures import duration
from mel_lite.report.page import drawn, flat, render
from mel_lite.text import printable

if TYPE_CHECKING:
    from rich.table import Table

WIDE = 120
"""Columns of a terminal from which a table has room for all measures."""


def write_comparison(arms: Sequence[Arm], found: Comparison, folder: Path) -> list[Path]:
    """Write comparison.html, .json and, where there are curves, .png into a folder, and return their paths.

    Raises: OSError when they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings = curves(arms)
    page, data, picture = (folder / f"comparison.{suffix}" for suffix in ("html", "json", "png"))
    atomic_write_text(page, _page(arms, found, drawings))
    atomic_write_text(data, found.to_json() + "\n")
    if not drawings:
        return [page, data]
    with replacing(picture) as staged:
        staged.write_bytes(charts.png([chart for name, chart in drawings if name.endswith("tokens")]))
    return [page, data, picture]


def _page(arms: Sequence[Arm], found: Comparison, drawings: list[tuple[str, charts.Chart]]) -> str:
    return render(
        "compare.html",
        title="MEL-Lite comparison",
        found=found,
        names=names_of(found),
        charts=drawn(drawings),
        options=_differing(arms),
        duration=duration,
    )


def _differing(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """Return the options in which the first runs of the arms differ, with each arm's value."""
    options = [flat(arm.runs[0].config) for arm in arms]
    rows = []
    for key in dict.fromkeys(key for each in options for key in each):
        values = ["(default)" if key not in each else printable(str(each[key])) for each in options]
        if len(set(values)) > 1 and key != "train.seed":
            rows.append((key, values))
    return rows


def comparison_table(found: Comparison, width: int = WIDE) -> Table:
    """Render a comparison for a terminal of so many columns; fewer than `WIDE` show Avg@k alone."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="after training", title_justify="left")
    for heading in ("arm", "seeds", "steps", "tokens", "time"):
        table.add_column(heading, justify="left" if heading == "arm" else "right", overflow="fold")
    names = {name: text for name, text in names_of(found).items() if width >= WIDE or name == "avg_at_k"}
    names = names if found.tasks else {}
    for text in names.values():
        table.add_column(text, justify="right", overflow="fold")
    if names:
        table.add_column(f"{names['avg_at_k']} minus the first arm's, points", justify="right", overflow="fold")
    for arm in found.arms:
        cells = [str(len(arm.seeds)), f"{arm.steps:.0f}", f"{arm.tokens:,.0f}", duration(arm.seconds)]
        cells += [arm.after[name].as_share() for name in names]
        if names:
            cells.append(arm.difference["avg_at_k"].as_points() if arm.difference else "")
        table.add_row(Text(arm.name), *cells)
    return table
