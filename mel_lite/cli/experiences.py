"""`mel-lite experiences`: browse the meta-experiences of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mel_lite.cli.shared import console, newest_run
from mel_lite.errors import ConfigError, check_choice
from mel_lite.imports import load_object
from mel_lite.types import BankLesson, Status

experiences = typer.Typer(help="Browse the meta-experiences of a run.", no_args_is_help=True)

RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder. Default: the newest in runs/.")]


@experiences.command("list")
def list_(
    run: RunOption = None,
    status: Annotated[str | None, typer.Option(help=f"{', '.join(Status)}.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Only this step.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of newest rows.")] = 50,
) -> None:
    """List meta-experiences, including dropped ones."""
    from mel_lite.run.display import experiences_table, store_line

    wanted = _status(status)
    with _store(run) as store:
        console().print(experiences_table(store.list(status=wanted, step=step, limit=limit)))
        console().print(store_line(store.funnel()))


@experiences.command("show")
def show(id_: Annotated[int, typer.Argument(metavar="ID")], run: RunOption = None) -> None:
    """Show one meta-experience in full, with both rollouts and its replays."""
    from mel_lite.run.display import experience_page

    with _store(run) as store:
        console().print(experience_page(store.get(id_)))


@experiences.command("search")
def search(
    text: str, run: RunOption = None, limit: Annotated[int, typer.Option(min=1, help="Maximum number of rows.")] = 50
) -> None:
    """Search the text of meta-experiences."""
    from mel_lite.run.display import experiences_table

    with _store(run) as store:
        console().print(experiences_table(store.search(text, limit=limit)))


@experiences.command("export")
def export_experiences(
    output: Annotated[Path, typer.Argument(help="File to write: .jsonl or .parquet.")],
    run: RunOption = None,
    status: Annotated[str | None, typer.Option(help=f"{', '.join(Status)}.")] = None,
) -> None:
    """Write meta-experiences to a JSONL or parquet file."""
    wanted = _status(status)
    with _store(run) as store:
        rows = store.export(output, status=wanted)
    typer.echo(f"wrote {rows} rows to {output}")


@experiences.command("bank")
def bank(
    run: Annotated[Path | None, typer.Argument(help="Run or checkpoint folder. Default: the newest in runs/.")] = None,
    truth: Annotated[
        str | None,
        typer.Option(help="pkg:fn, a function (heuristic) that returns True, False, or None where it cannot tell."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the lessons as JSON.")] = False,
) -> None:
    """List the lessons of a run's bank, best first: of its newest checkpoint, or else of its store."""
    from mel_lite.resilience.saved_bank import saved_lessons
    from mel_lite.run.display import bank_line, bank_table

    lessons = sorted(saved_lessons(run or newest_run(), field="RUN"), key=lambda lesson: -lesson.score)
    truths = None if truth is None else _truths(truth, lessons)
    if as_json:
        known = [{}] * len(lessons) if truths is None else [{"true": each} for each in truths]
        typer.echo(json.dumps([asdict(lesson) | also for lesson, also in zip(lessons, known, strict=True)], indent=1))
        return
    console().print(bank_table(lessons, truths))
    console().print(bank_line(lessons, truths))


def _truths(path: str, lessons: Sequence[BankLesson]) -> list[bool | None]:
    """Return what the user's function says of each lesson. Raises: ConfigError for anything but a bool or None."""
    is_true = load_object(path, field="--truth", error=ConfigError)
    found = [is_true(lesson.heuristic) for lesson in lessons]
    for lesson, value in zip(lessons, found, strict=True):
        if value is not None and not isinstance(value, bool):
            raise ConfigError(
                f"--truth {path!r} returned {value!r} for lesson {lesson.id}. Return True, False or None."
            )
    return found


def _status(name: str | None) -> str | None:
    if name is not None:
        check_choice("--status", name, Status)
    return name


def _store(run: Path | None) -> Any:
    from mel_lite.lessons.store import ExperienceStore

    folder = run or newest_run()
    return ExperienceStore(folder / "experiences.sqlite", read_only=True)
