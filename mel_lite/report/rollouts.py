"""Rollouts of a run, from the tables that the trainer logs to `completions/`, one parquet file per logged step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mel_lite.errors import ConfigError, DataError
from mel_lite.models.chat import question_text
from mel_lite.report.runs import is_number
from mel_lite.text import first_line, printable
from mel_lite.types import Verdict
from mel_lite.verify.judge import REWARD_COLUMN, VERDICT_COLUMN, completion_text

FOLDER = "completions"
VERIFIER_REWARD = "_verifier_reward"
"""TRL's column of the default reward: 1 for right, 0 for wrong, none for abstain."""
_FILE = re.compile(r"completions_(\d+)\.parquet")


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """One completion as logged."""

    id: str
    """`<step>.<row>`."""
    step: int
    """Optimizer step whose log holds it, from 1."""
    row: int
    """Its row in that log, from 0: the rollout's index in the generation batch."""
    prompt: Any
    """Text or messages, as the policy was asked."""
    question: str
    verdict: str | None
    """`right`, `wrong` or `abstain`; None in logs of an older release that do not tell."""
    reward: float | None
    """Weighted sum of the reward functions; None where all abstained or the log does not tell."""
    advantage: float | None
    text: str
    columns: dict[str, Any]
    """Each reward function's value, and what reward functions logged, by name."""

    def has(self, words: Sequence[str], *, everywhere: bool) -> bool:
        """Return True when the question, or `everywhere` question and text, has all words, ignoring case."""
        text = (f"{self.question}\n{self.text}" if everywhere else self.question).casefold()
        return all(word in text for word in words)


class RolloutLog:
    """The logged rollouts of a run. `problems` names the files that could not be read so far."""

    def __init__(self, run: Path) -> None:
        """Raises: ConfigError when the run has logged no rollouts."""
        folder = run / FOLDER
        found = {int(match[1]): path for path in folder.glob("*.parquet") if (match := _FILE.fullmatch(path.name))}
        if not found:
            raise ConfigError(
                f"{folder}: there are no logged rollouts. A run writes them after each logged step, with "
                "train.log_completions=true; pass the folder of such a run."
            )
        self.problems: list[str] = []
        self._files = dict(sorted(found.items()))

    def find(
        self,
        *,
        step: int | None = None,
        task: str = "",
        text: str = "",
        verdict: str | None = None,
        limit: int | None = None,
    ) -> list[RolloutRow]:
        """Return the newest `limit` rollouts, oldest first.

        Args: task: words of the question. text: words of question or completion. Both ignore case.

        Raises: ConfigError for a step that was not logged.
        """
        if step is not None and step not in self._files:
            steps = f"{min(self._files)} to {max(self._files)}"
            raise ConfigError(f"--step {step}: no rollouts of this step were logged; steps {steps} have some.")
        asked, said = task.casefold().split(), text.casefold().split()
        rows: list[RolloutRow] = []
        for number in reversed(self._files) if step is None else [step]:
            for row in reversed(list(self._read(number))):
                if limit is not None and len(rows) >= limit:
                    return rows[::-1]
                if (
                    verdict in (None, row.verdict)
                    and row.has(asked, everywhere=False)
                    and row.has(said, everywhere=True)
                ):
                    rows.append(row)
        return rows[::-1]

    def get(self, id_: str) -> RolloutRow:
        """Return the rollout `<step>.<row>`. Raises: ConfigError without one; DataError if its file is damaged."""
        step, _, row = id_.partition(".")
        if not (step.isdecimal() and row.isdecimal()):
            raise ConfigError(
                f"rollout {id_!r} is no id. Pass <step>.<row>, such as 12.3, as `rollouts list` shows it."
            )
        rows = self.find(step=int(step))
        if self.problems:
            raise DataError(self.problems[0])
        if int(row) >= len(rows):
            raise ConfigError(f"rollout {id_}: step {step} has the rollouts {step}.0 to {step}.{len(rows) - 1}.")
        return rows[int(row)]

    def _read(self, step: int) -> Iterator[RolloutRow]:
        import pyarrow
        import pyarrow.parquet as pq

        path = self._files[step]
        try:
            table = pq.ParquetFile(path).read().to_pylist()
            rows = [_row(step, number, values) for number, values in enumerate(table)]
        except (OSError, pyarrow.ArrowException, KeyError, TypeError, AttributeError) as error:
            reason = printable(first_line(error)) or type(error).__name__
            self.problems.append(f"{path.parent.name}/{path.name} cannot be read ({reason}).")
            return
        yield from rows


def _row(step: int, number: int, values: dict[str, Any]) -> RolloutRow:
    known = ("step", "prompt", "completion", "advantage", VERDICT_COLUMN, REWARD_COLUMN)
    columns = {name: value for name, value in values.items() if name not in known}
    verdict = values.get(VERDICT_COLUMN)
    if verdict is None and VERIFIER_REWARD in columns:
        verdict = {1.0: Verdict.RIGHT, 0.0: Verdict.WRONG}.get(columns[VERIFIER_REWARD], Verdict.ABSTAIN)
    reward = values.get(REWARD_COLUMN)
    if REWARD_COLUMN not in values and len(columns) == 1:
        reward = next(iter(columns.values()))
    advantage = values.get("advantage")
    return RolloutRow(
        id=f"{step}.{number}",
        step=step,
        row=number,
        prompt=values["prompt"],
        question=question_text(values["prompt"]),
        verdict=None if verdict is None else str(verdict),
        reward=reward if is_number(reward) else None,
        advantage=advantage if is_number(advantage) else None,
        text=completion_text(values["completion"]),
        columns={name: _plain(value) for name, value in columns.items()},
    )


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: no NaN, no object."""
    if value is None or isinstance(value, bool) or is_number(value):
        return value
    return None if isinstance(value, float) else str(value)
