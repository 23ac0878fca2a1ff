"""The files of a run folder, read tolerantly: what is missing or damaged becomes a note in the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import yaml

from mel_lite.errors import ConfigError, DataError, StoreError
from mel_lite.lessons.store import FILE_NAME, ExperienceRow, ExperienceStore
from mel_lite.report.record import read_record
from mel_lite.text import first_line, printable

if TYPE_CHECKING:
    from mel_lite.evaluate import EvalResult

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """Contents of a run folder."""

    folder: Path
    config: dict[str, Any]
    """Sections of config.yaml; empty without that file."""
    record: dict[str, Any]
    """Content of run.json; empty without that file, as in runs of older versions."""
    rows: tuple[Row, ...]
    """Training steps of metrics.jsonl, oldest first."""
    eval_rows: tuple[Row, ...]
    """Evaluations during training, from the same file: Avg@k of `eval.every_steps`, or TRL's reward of `eval_strategy`.
    """
    before: EvalResult | None
    after: EvalResult | None
    finished: bool
    """True when the trained weights were saved."""
    lessons: tuple[ExperienceRow, ...] = ()
    """All meta-experiences, oldest first."""
    problems: tuple[str, ...] = field(default=())
    """One sentence for each file that is missing or damaged."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return printable(self.folder.resolve().name)

    @property
    def steps(self) -> int:
        """Number of the last logged step, from 1; 0 without one."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def planned_steps(self) -> int | None:
        """`train.max_steps`; None when the run's length is given in epochs or tokens, or unknown."""
        steps = None if self.option("train.max_generated_tokens") else self.option("train.max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    def option(self, dotted: str) -> Any:
        """Return the value of a config option such as `train.seed`; None when it is not set."""
        section, _, key = dotted.partition(".")
        return (self.config.get(section) or {}).get(key)


def read_run(folder: Path, *, lessons: bool = True) -> Run:
    """Read a run folder, with its meta-experiences or without. Raises: ConfigError when the folder holds no run."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder. Pass the folder of a run, such as runs/<name>.")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{folder} holds no run: it has neither config.yaml nor metrics.jsonl.")
    problems: list[str] = []
    config = _config(folder / "config.yaml", problems)
    rows = _rows(folder / "metrics.jsonl", problems)
    finished = any((folder / name).is_dir() for name in ("adapter", "model"))
    if finished and not rows and not any("metrics.jsonl" in problem for problem in problems):
        problems.append("metrics.jsonl holds no step. There are no curves.")
    found = _lessons(folder / FILE_NAME, config, problems) if lessons else ()
    before, after = (_evaluation(folder / "eval" / f"{name}.json", problems) for name in ("before", "after"))
    return Run(
        folder,
        config,
        read_record(folder),
        # A step that updates on an earlier batch again (num_iterations) logs a loss, and no reward.
        tuple(row for row in rows if is_number(row.get("reward")) or is_number(row.get("loss"))),
        tuple(row for row in rows if any(is_number(row.get(f"eval_{name}")) for name in ("reward", "avg_at_k"))),
        before,
        after,
        finished=finished,
        lessons=found,
        problems=tuple(problems),
    )


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not all(isinstance(each, dict | None) for each in config.values()):
            raise ValueError("it is no mapping of sections")
        return config
    except FileNotFoundError:
        problems.append("config.yaml is missing, as in runs that a script started. The options are not shown.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"config.yaml cannot be read ({printable(first_line(error))}). The options are not shown.")
    return {}


def _rows(path: Path, problems: list[str]) -> list[Row]:
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        problems.append(f"metrics.jsonl cannot be read ({error.strerror}). There are no curves.")
        return []
    rows, damaged = [], 0
    for line in lines:
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not is_number(row.get("step")):
                raise ValueError
            rows.append(row)
        except (ValueError, RecursionError):
            damaged += 1
    if damaged:
        problems.append(f"metrics.jsonl: {damaged} of {len(lines)} lines cannot be read and are left out.")
    return rows


def _lessons(path: Path, config: dict[str, Any], problems: list[str]) -> tuple[ExperienceRow, ...]:
    if not path.is_file():
        algorithm = (config.get("train") or {}).get("algorithm", "mel")
        if config and algorithm == "mel":
            problems.append(f"{path.name} is missing: no meta-experience was drawn yet, or the file was removed.")
        return ()
    try:
        with ExperienceStore(path, read_only=True) as store:
            return tuple(store.list())
    except StoreError as error:
        problems.append(printable(first_line(error, 400)))
    return ()


def _evaluation(path: Path, problems: list[str]) -> EvalResult | None:
    from mel_lite.evaluate import EvalResult

    if not path.is_file():
        return None
    try:
        return EvalResult.from_json(path.read_text(encoding="utf-8"))
    except (DataError, OSError, UnicodeDecodeError) as error:
        problems.append(f"eval/{path.name}: {printable(first_line(error))}")
        return None


def is_number(value: Any) -> TypeGuard[float]:
    """Return True for a finite int or float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Return the steps that logged a number under `name`, and the numbers."""
    found = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def evaluations(run: Run, name: str) -> tuple[list[float], list[float]]:
    """Return the steps at which held-out tasks were evaluated, from 0 = before training, and a measure's values."""
    steps, values = series(run.eval_rows, f"eval_{name}")
    first = [(0.0, getattr(run.before, name).value)] if run.before is not None else []
    last = [(float(run.steps), getattr(run.after, name).value)] if run.after is not None else []
    points = [*first, *zip(steps, values, strict=True), *last]
    return [step for step, _ in points], [value for _, value in points]


def step_counts(rows: Sequence[Row]) -> list[int]:
    """Return how many steps each row stands for: with `logging_steps` above 1, its figures are means over them."""
    steps = [0, *(int(row["step"]) for row in rows)]
    return [max(1, step - previous) for previous, step in pairwise(steps)]


def phase_seconds(rows: Sequence[Row]) -> dict[str, float]:
    """Return the seconds of each phase of the steps, summed over the run, by the phase's name."""
    totals: dict[str, float] = {}
    for row, count in zip(rows, step_counts(rows), strict=True):
        for name, seconds in _phases(row).items():
            totals[name] = totals.get(name, 0.0) + count * seconds
    return totals


def _phases(row: Row) -> dict[str, float]:
    return {
        name.removeprefix("time/").removesuffix("_s"): value
        for name, value in row.items()
        if name.startswith("time/") and name.endswith("_s") and is_number(value)
    }


def generated_tokens(rows: Sequence[Row]) -> list[float]:
    """Return the tokens generated up to and including each row: rollouts, analyses and replays."""
    tokens = (row.get("mel/generated_tokens") for row in rows)
    per_step = (value if is_number(value) else 0.0 for value in tokens)
    return list(accumulate(count * value for count, value in zip(step_counts(rows), per_step, strict=True)))


def training_seconds(rows: Sequence[Row]) -> list[float]:
    """Return the seconds spent in the phases of the steps up to and including each row."""
    per_row = (count * sum(_phases(row).values()) for row, count in zip(rows, step_counts(rows), strict=True))
    return list(accumulate(per_row))
