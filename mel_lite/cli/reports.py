"""`mel-lite report` and `mel-lite compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mel_lite.cli.shared import loading, newest_run
from mel_lite.errors import ConfigError


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
