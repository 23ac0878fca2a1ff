"""`mel-lite rollouts`: the logged completions of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mel_lite.cli.shared import FolderArgument, JsonOption, LimitOption, RunOption, console, newest_run, print_json

rollouts = typer.Typer(help="Browse the rollouts of a run.", no_args_is_help=True)

StepOption = Annotated[int | None, typer.Option(min=1, help="Only this step.")]
TaskOption = Annotated[str, typer.Option(help="Only questions with these words.")]
RightOption = Annotated[bool | None, typer.Option("--right/--wrong", help="Only right or only wrong ones.")]


@rollouts.command("list")
def list_(
    folder: FolderArgument = None,
    run: RunOption = None,
    step: StepOption = None,
    task: TaskOption = "",
    right: RightOption = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """List the newest rollouts, oldest first."""
    _print_found(folder or run, step, task, "", right, limit, as_json=as_json)


@rollouts.command("search")
def search(
    text: str,
    run: RunOption = None,
    step: StepOption = None,
    task: TaskOption = "",
    right: RightOption = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """Search question and text of rollouts."""
    _print_found(run, step, task, text, right, limit, as_json=as_json)


@rollouts.command("show")
def show(
    id_: Annotated[str, typer.Argument(metavar="ID", help="<step>.<row>, such as 12.3.")],
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one rollout in full."""
    from mel_lite.lessons.store import FILE_NAME, ExperienceStore
    from mel_lite.report.credit import strips
    from mel_lite.report.rollouts import RolloutLog
    from mel_lite.report.terminal import rollout_page

    folder = run or newest_run()
    row = RolloutLog(folder).get(id_)
    credit = []
    if (folder / FILE_NAME).is_file():
        with ExperienceStore(folder / FILE_NAME, read_only=True) as store:
            credit = store.credit(row.step, [row.row])
    if as_json:
        print_json(asdict(row) | {"token_credit": [asdict(each) for each in credit]})
    else:
        console().print(rollout_page(row, strips(credit)))


def _print_found(
    run: Path | None, step: int | None, task: str, text: str, right: bool | None, limit: int, *, as_json: bool
) -> None:
    from mel_lite.report.rollouts import RolloutLog
    from mel_lite.report.terminal import rollouts_list
    from mel_lite.types import Verdict

    log = RolloutLog(run or newest_run())
    verdict = None if right is None else (Verdict.RIGHT if right else Verdict.WRONG).value
    rows = log.find(step=step, task=task, text=text, verdict=verdict, limit=limit)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        shown = console()
        shown.print(rollouts_list(rows, shown.width))
        more = f", the newest; more with --limit {2 * limit}" if len(rows) == limit else ""
        shown.print(f"{len(rows)} {'rollout' if len(rows) == 1 else 'rollouts'}{more}")
    if log.problems:
        others = f" {len(log.problems) - 1} more files cannot be read." if len(log.problems) > 1 else ""
        typer.echo(f"note: {log.problems[0]}{others}", err=True)
