"""Files and tables of a comparison: comparison.html, comparison.png, comparison.json and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mel_lite.files import atomic_write_text, replacing
from mel_lite.report import charts
from mel_lite.report.arms import IGNORED, Arm, ArmResult, Comparison, names_of
from mel_lite.report.compare import charts as curves
from mel_lite.report.figures import duration
from mel_lite.report.page import drawn, flat, render
from mel_lite.text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


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
        if len(set(values)) > 1 and key not in IGNORED:
            rows.append((key, values))
    return rows


def comparison_table(found: Comparison, width: int) -> RenderableType:
    """Render a comparison for a terminal of so many columns: all measures, or else Avg@k, or else a block per arm."""
    from rich.console import Console, Group
    from rich.text import Text

    names = names_of(found) if found.tasks else {}
    for shown in (names, {name: text for name, text in names.items() if name == "avg_at_k"}):
        table = _table(found, shown)
        if Console(width=1000).measure(table).maximum <= width:
            return table
    return Group(*(Text(_block(found, arm)) for arm in found.arms))


def _table(found: Comparison, names: dict[str, str]) -> Table:
    """Return the table of these measures, with intervals on lines of their own."""
    from rich.table import Table
    from rich.text import Text

    table = Table("arm", title="after training", title_justify="left")
    for heading in ("seeds", "steps", "tokens", "time", *names.values()):
        table.add_column(heading, justify="right")
    if names:
        table.add_column(f"{names['avg_at_k']} minus\nthe first\narm's, points", justify="right")
    for arm in found.arms:
        cells = [str(len(arm.seeds)), f"{arm.steps:.0f}", f"{arm.tokens:,.0f}", duration(arm.seconds)]
        figures = [arm.after[name].as_share() for name in names]
        if names:
            figures.append(arm.difference["avg_at_k"].as_points() if arm.difference else "")
        table.add_row(Text(arm.name), *cells, *(figure.replace(" [", "\n[") for figure in figures))
    return table


def _block(found: Comparison, arm: ArmResult) -> str:
    runs = "1 run" if len(arm.seeds) == 1 else f"{len(arm.seeds)} runs"
    lines = [f"{arm.name}: {runs}, {arm.steps:.0f} steps, {arm.tokens:,.0f} tokens, {duration(arm.seconds)}"]
    if found.tasks:
        lines.append(f"  {names_of(found)['avg_at_k']} {arm.after['avg_at_k'].as_share()}")
    if arm.difference:
        lines.append(f"  minus the first arm's: {arm.difference['avg_at_k'].as_points()} points")
    return "\n".join(lines)
