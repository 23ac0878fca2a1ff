"""What trackers get besides TRL's metrics: tables of lessons, and the evaluations before and after training.

No tracker is imported here: transformers' callbacks hold their package. Each call runs in the tracker's own thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mel_lite.models.chat import question_text
from mel_lite.text import printable

if TYPE_CHECKING:
    from mel_lite.evaluate import EvalResult
    from mel_lite.lessons.store import ExperienceRow

MOST_LESSONS = 16
"""Newest lessons that one log sends."""
MOST_CHARACTERS = 1_000
"""Longer texts are cut in a table."""
COLUMNS = ("step", "id", "status", "question", "wrong step", "heuristic", "uplift", "nll before", "nll after")


def send_lessons(trainer: Any) -> None:
    """Send the meta-experiences that are new since the last call, at most `MOST_LESSONS`, to every tracker."""
    last = trainer.last_experience_id
    for callback in trainer.callback_handler.callbacks:
        tracker = getattr(callback, "tracker", None)
        if tracker is None or not last or last <= tracker.sent_lessons:
            continue
        rows = trainer.store.list(limit=min(MOST_LESSONS, last - tracker.sent_lessons))
        tracker.sent_lessons = last
        tracker.post(_publish, callback, [lesson_cells(row) for row in rows], trainer.state.global_step)


def lesson_cells(row: ExperienceRow) -> list[Any]:
    """Return one row of the table: the values of `COLUMNS`."""
    texts = (question_text(row.prompt), row.quoted_step, row.heuristic)
    numbers = [None if value is None else round(value, 4) for value in (row.uplift, row.nll_before, row.nll_after)]
    return [row.step, row.id, row.status.value, *(printable(text or "")[:MOST_CHARACTERS] for text in texts), *numbers]


def _publish(callback: Any, rows: list[list[Any]], step: int) -> None:
    """Log one table by a tracker's own means; a tracker without tables or texts gets none."""
    if getattr(callback, "tb_writer", None) is not None:
        callback.tb_writer.add_text("lessons", markdown(rows), step)
    elif (package := getattr(callback, "_wandb", None)) is not None:
        package.log({"lessons": package.Table(columns=list(COLUMNS), data=rows)})
    elif (package := getattr(callback, "_trackio", None)) is not None:
        import pyarrow as pa

        table = pa.Table.from_pylist([dict(zip(COLUMNS, row, strict=True)) for row in rows])
        package.log({"lessons": package.Table(dataframe=table.to_pandas())})


def markdown(rows: list[list[Any]]) -> str:
    """Return rows as a Markdown table, as TensorBoard shows texts."""
    cells = [["" if cell is None else " ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in cells)])


def send_evaluation(trainer: Any, result: EvalResult) -> None:
    """Send an evaluation to the trackers: `eval/pass_at_1`, `eval/avg_at_k` and `eval/pass_at_k`, with intervals.

    They are not part of metrics.jsonl, whose lines are steps; the run folder has them in eval/.
    """
    logs: dict[str, float] = {}
    for name in ("pass_at_1", "avg_at_k", "pass_at_k"):
        interval = getattr(result, name)
        logs |= {f"eval_{name}": interval.value, f"eval_{name}_low": interval.low, f"eval_{name}_high": interval.high}
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "tracker"):
            callback.on_log(trainer.args, trainer.state, trainer.control, logs=logs, model=trainer.model)
