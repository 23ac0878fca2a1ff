"""Charts as SVG, for a page in light or dark, or as PNG. matplotlib draws them.

In an SVG every color is a variable of the page's style sheet and every text is text in the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 300
"""Longer lines are drawn as means of equally many points."""
SERIES = 8
"""Number of colors."""
_MARKS = {"text": "#010101", "grid": "#010102", **{f"s{i}": f"#0102{i:02x}" for i in range(SERIES)}}
"""Color in the drawing -> its variable in the page, such as `var(--s0)`."""
LIGHT = {
    "text": "#1d2129", "grid": "#d5dae1", "s0": "#0b62d6", "s1": "#c2410c", "s2": "#0f7b53", "s3": "#8b3fd1",
    "s4": "#b3261e", "s5": "#5b6776", "s6": "#a16207", "s7": "#0e7490",
}  # fmt: skip
"""Colors of a PNG, and of a page in light."""
DARK = {
    "text": "#e6e9ee", "grid": "#39414d", "s0": "#6ea8ff", "s1": "#ff9a62", "s2": "#4fd39b", "s3": "#c79bff",
    "s4": "#ff8a80", "s5": "#9aa7b8", "s6": "#e3b341", "s7": "#5cd0e6",
}  # fmt: skip
STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    """Number of the color, from 0."""
    faint: bool = False
    """Thin and pale, as for the single values below their mean. It has no entry in the legend."""
    marks: bool = False
    """A dot at each point."""
    spread: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper end of a band around the line."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of lines over one axis, or of shares stacked on each other."""

    title: str
    lines: tuple[Line, ...]
    x_label: str = "step"
    y_label: str = ""
    percent: bool = False
    """y is a share, shown in percent."""
    zero: bool = False
    """Draw the line y = 0."""
    stacked: bool = False
    """Fill the areas between the sums of the lines."""

    @property
    def caption(self) -> str:
        """Return first and last value of each line, for readers who do not see the chart."""
        parts = []
        for line in self.lines:
            if line.y and not line.faint:
                first, last = (f"{y:.1%}" if self.percent else f"{y:.4g}" for y in (line.y[0], line.y[-1]))
                parts.append(f"{line.label or self.title}: {first} to {last}")
        return f"{self.title}. {'; '.join(parts)}"


def thinned(values: Sequence[float]) -> list[float]:
    """Return at most `MOST_POINTS` values: means of equal parts, in order."""
    if len(values) <= MOST_POINTS:
        return list(values)
    edges = [round(i * len(values) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and its neighbors, `width` values in all, fewer at the ends."""
    half = width // 2
    sums = [0.0, *accumulate(values)]
    ends = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def trend(label: str, x: Sequence[float], y: Sequence[float], color: int = 0) -> tuple[Line, ...]:
    """Return the lines of one quantity: its values, and over many steps their moving average in front."""
    if len(y) < 30:
        return (Line(label, x, y, color, marks=len(y) <= 12),)
    mean = smoothed(y, max(3, len(y) // 15))
    return (
        Line(label, thinned(x), thinned(y), color, faint=True),
        Line(label, thinned(x), thinned(mean), color),
    )


def svg(chart: Chart, name: str) -> str:
    """Return the chart as an SVG element to put into a page. `name` keeps its ids apart from other charts'."""
    with _settings(_MARKS, name):
        figure = _drawn((chart,), _MARKS, (4.6, 2.75))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z0-9.]+_[0-9]+"', "", text)  # groups; clip paths and markers keep theirs
    text = text.replace("'DejaVu Sans'", "var(--font)")
    for variable, mark in _MARKS.items():
        text = text.replace(mark, f"var(--{variable})")
    return text


def png(charts: Sequence[Chart]) -> bytes:
    """Return the charts next to each other as a PNG in light colors."""
    with _settings(LIGHT, "png"):
        figure = _drawn(tuple(charts), LIGHT, (5.2 * len(charts), 3.6))
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _settings(colors: dict[str, str], salt: str) -> AbstractContextManager[None]:
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 9,
            "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.fontsize": 8,
            "text.color": colors["text"], "axes.labelcolor": colors["text"], "axes.edgecolor": colors["grid"],
            "xtick.color": colors["grid"], "ytick.color": colors["grid"], "xtick.labelcolor": colors["text"],
            "ytick.labelcolor": colors["text"], "axes.titlecolor": colors["text"], "grid.color": colors["grid"],
            "axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False,
            "axes.spines.right": False, "axes.unicode_minus": True, "font.family": "DejaVu Sans",
        }
    )  # fmt: skip


def _drawn(charts: tuple[Chart, ...], colors: dict[str, str], inches: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    parts = figure.subfigures(1, len(charts), squeeze=False)[0]
    for part, chart in zip(parts, charts, strict=True):
        _draw(part.subplots(), chart, colors)
        _legend(part, chart)
    return figure


def _draw(axes: Any, chart: Chart, colors: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    if chart.stacked:
        shades = [colors[f"s{line.color % SERIES}"] for line in chart.lines]
        labels = [line.label for line in chart.lines]
        x = chart.lines[0].x
        axes.stackplot(x, *(line.y for line in chart.lines), labels=labels, colors=shades, alpha=0.75, linewidth=0)
    else:
        for line in chart.lines:
            _draw_line(axes, line, colors)
    if chart.zero:
        axes.axhline(0, color=colors["text"], linewidth=0.7)
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        if not chart.zero:
            top = max((y for line in chart.lines for y in line.y), default=0.0)
            axes.set_ylim(0, max(0.1, 1.08 * top))
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=chart.x_label == "step", min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(length=3)


def _legend(figure: Any, chart: Chart) -> None:
    """Put the legend below the axes, where it covers no line."""
    named = [line for line in chart.lines if line.label and not line.faint]
    if named:
        columns = max(1, min(3, 60 // (max(len(line.label) for line in named) + 4)))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, handlelength=1.4, columnspacing=1.2)


def _draw_line(axes: Any, line: Line, colors: dict[str, str]) -> None:
    color = colors[f"s{line.color % SERIES}"]
    style = STYLES[line.color // SERIES % len(STYLES)]
    if line.spread is not None:
        axes.fill_between(line.x, *line.spread, color=color, alpha=0.15, linewidth=0)
    axes.plot(
        line.x,
        line.y,
        color=color,
        linestyle=style,
        linewidth=0.8 if line.faint else 1.7,
        alpha=0.35 if line.faint else 1.0,
        marker="o" if line.marks else None,
        markersize=3.5,
        label="_nolegend_" if line.faint or not line.label else line.label,
    )
