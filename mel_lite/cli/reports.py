"""`mel-lite report` and `mel-lite compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mel_lite.cli.shared import console, loading, newest_run
from mel_lite.errors import ConfigError

if TYPE_CHECKING:
    from mel_lite.report.compare import Comparison


def report(
    run: Annotated[Path | None, typer.Argument(help="Run folder. Default: the newest in runs/.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write. Default: report.html in the run folder.")] = None,
    lessons: Annotated[int, typer.Option(min=0, help="Maximum number of lessons in the page.")] = 200,
) -> None:
    """Write one self-contained HTML page about a run: result, curves, funnel, time, options and lessons."""
    folder = run or newest_run()
    with loading("reading the run"):
        from mel_lite.report.page import write_report

        try:
            path = write_report(folder, output, most_lessons=lessons)
        except OSError as error:
            raise ConfigError(
                f"--output {output or folder / 'report.html'}: it cannot be written ({error.strerror or error}). "
                "Choose another file."
            ) from error
    typer.echo(str(path))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of the runs. The first one's arm is the reference.")],
    output: Annotated[Path, typer.Option(help="Folder for comparison.html, .png and .json.")] = Path("comparison"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Compare runs on the same held-out tasks: paired differences with intervals, learning curves, conclusions.

    Runs that differ in their seed alone are one arm.
    """
    with loading("reading the runs"):
        from mel_lite.report.compare import compare as compare_arms
        from mel_lite.report.compare import read_arms
        from mel_lite.report.comparison_page import write_comparison

        arms = read_arms(runs)
        found = compare_arms(arms)
        try:
            written = write_comparison(arms, found, output)
        except OSError as error:
            raise ConfigError(
                f"--output {output}: it cannot be written ({error.strerror or error}). Choose another folder."
            ) from error
    _show(found, written, as_json=as_json)


def _show(found: Comparison, written: list[Path], *, as_json: bool) -> None:
    """Print a comparison."""
    from mel_lite.report.comparison_page import comparison_table

    if as_json:
        typer.echo(found.to_json())
        return
    console().print(comparison_table(found))
    for sentence in found.conclusions:
        typer.echo(sentence)
    for sentence in found.limits:
        typer.echo(f"note: {sentence}")
    typer.echo("\n".join(map(str, written)))
