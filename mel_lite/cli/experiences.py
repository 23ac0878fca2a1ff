"""`mel-lite experiences`: browse the meta-experiences of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mel_lite.cli.shared import FolderArgument, JsonOption, LimitOption, RunOption, console, newest_run, print_json
from mel_lite.errors import ConfigError, check_choice
from mel_lite.imports import load_object
from mel_lite.types import Algorithm, BankLesson, Status

experiences = typer.Typer(help="Browse the meta-experiences of a run.", no_args_is_help=True)


@experiences.command("list")
def list_(
    folder: FolderArgument = None,
    run: RunOption = None,
    status: Annotated[str | None, typer.Option(help=f"{', '.join(Status)}.")] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Only this step.")] = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """List meta-experiences, including dropped ones."""
    from mel_lite.report.terminal import store_line

    wanted = _status(status)
    with _store(folder or run) as store:
        _print_rows(store.list(status=wanted, step=step, limit=limit), as_json=as_json)
        if not as_json:
            console().print(store_line(store.funnel()))


@experiences.command("show")
def show(id_: Annotated[int, typer.Argument(metavar="ID")], run: RunOption = None, as_json: JsonOption = False) -> None:
    """Show one meta-experience in full, with both rollouts and its replays."""
    from mel_lite.report.credit import strips
    from mel_lite.report.terminal import experience_page

    with _store(run) as store:
        row = store.get(id_)
        credit = store.credit(row.rollouts_step, (row.wrong_index, row.right_index))
    if as_json:
        print_json(asdict(row) | {"token_credit": [asdict(each) for each in credit]})
    else:
        console().print(experience_page(row, strips(credit)))


@experiences.command("search")
def search(text: str, run: RunOption = None, limit: LimitOption = 50, as_json: JsonOption = False) -> None:
    """Search the text of meta-experiences."""
    with _store(run) as store:
        _print_rows(store.search(text, limit=limit), as_json=as_json)


def _print_rows(rows: Sequence[Any], *, as_json: bool) -> None:
    from mel_lite.report.terminal import experiences_list

    if as_json:
        print_json([asdict(row) for row in rows])
        return
    shown = console()
    shown.print(experiences_list(rows, shown.width))


@experiences.command("browse")
def browse(
    run: Annotated[Path | None, typer.Argument(help="Run folder. Default: the newest in runs/.")] = None,
) -> None:
    """Browse meta-experiences with the keyboard, also while the run trains."""
    try:
        from mel_lite.report.browser import browse as open_browser
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "textual":
            raise
        raise ConfigError(
            "experiences browse needs Textual, which is not installed. Run `pip install textual`."
        ) from error
    folder = run or newest_run()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError(
            "experiences browse needs a terminal. Use `mel-lite experiences list`, or `report` for a page."
        )
    open_browser(folder)


@experiences.command("export")
def export_experiences(
    output: Annotated[
        Path, typer.Argument(help="File to write (.jsonl or .parquet), or a new folder for a dataset with its card.")
    ],
    run: RunOption = None,
    status: Annotated[str | None, typer.Option(help=f"{', '.join(Status)}.")] = None,
) -> None:
    """Write meta-experiences to a JSONL or parquet file, or as a dataset folder that the Hub reads."""
    wanted = _status(status)
    if not output.suffix:
        from mel_lite.hub.dataset_card import export_dataset

        rows = export_dataset(run or newest_run(), output, status=wanted)
    else:
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
    as_json: JsonOption = False,
) -> None:
    """List the lessons of a run's bank, best first: of its newest checkpoint, or else of its store."""
    from mel_lite.resilience.saved_bank import saved_lessons
    from mel_lite.run.display import bank_line, bank_table

    folder = run or newest_run()
    _check_draws_lessons(folder)
    lessons = sorted(saved_lessons(folder, field="RUN"), key=lambda lesson: -lesson.score)
    truths = None if truth is None else _truths(truth, lessons)
    if as_json:
        known = [{}] * len(lessons) if truths is None else [{"true": each} for each in truths]
        print_json([asdict(lesson) | also for lesson, also in zip(lessons, known, strict=True)])
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
    _check_draws_lessons(folder)
    return ExperienceStore(folder / "experiences.sqlite", read_only=True)


def _check_draws_lessons(folder: Path) -> None:
    """Raises: ConfigError for a run without a store whose algorithm draws no lessons."""
    from mel_lite.recipe import value_in

    config = folder / "config.yaml"
    if (folder / "experiences.sqlite").is_file() or not config.is_file():
        return
    algorithm, also = (value_in(config, f"train.{name}") for name in ("algorithm", "meta_experience"))
    if algorithm not in (None, Algorithm.MEL) and not also:
        raise ConfigError(
            f"{folder} was trained with train.algorithm={algorithm}, which writes no meta-experiences. Name a run of "
            "train.algorithm=mel; `mel-lite rollouts list` shows the rollouts of this one."
        )
