"""Load tasks from any source into rows of `prompt` and `answer`, ready for TRL's GRPOTrainer.

    source -> raw rows -> (preset or columns) -> prompt, answer, the other columns -> checks -> datasets.Dataset

Sources (`spec`): `demo`, `demo:test`; a .jsonl, .json, .csv or .parquet file; `reasoning-gym:<task>?size=500&seed=1`
with any option of the task; a Hub id (or a folder in Hub layout), `hub_id:config` for one of its configurations. A
dataset's scripts are never run.
"""

from __future__ import annotations

import json
import logging
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from mel_lite.data.cells import (
    IMAGE_COLUMNS,
    NO_USER_TURN,
    REWARD_ARGUMENTS,
    Fault,
    free_name,
    has_user_turn,
    read_answer,
    read_prompt,
    with_system,
)
from mel_lite.data.files import PROMPT_COLUMNS, Row, Source, placed, repair_note, row_error
from mel_lite.data.sources import open_source
from mel_lite.errors import DataError
from mel_lite.types import Prompt

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
MAX_PROMPT_CHARS = 100_000
"""Longest prompt, as JSON with all its messages. Rows with a longer one are skipped and counted."""
MAX_ROW_CHARS = 1_000_000
"""Largest size of a row's other columns as JSON. Larger rows are skipped and counted."""
MAX_ANSWER_CHARS = 20_000
"""Longest reference answer. Rows with a longer one are skipped and counted."""
_RESERVED = ("prompt", "answer", *REWARD_ARGUMENTS, *IMAGE_COLUMNS)
"""Names of columns that mean something else to the trainer. Others of the same name are renamed."""
_PEEK = 100
_INTEGERS = range(-(2**63), 2**63)
"""Integers that a column can hold."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Reading instructions for a published dataset."""

    verifier: str
    """Verifier for its answers."""
    prompt: str
    answer: str
    config: str | None = None
    instruction: str = ""
    """Text appended to a plain prompt that gives the answer format the verifier expects."""
    answer_after: str = ""
    """Marker: the answer follows its last occurrence in the column. The whole text is kept as `rationale`."""
    once: bool = False
    """Keep only the first row of each prompt."""


PRESETS: dict[str, Preset] = {
    # 1.8 million rows that repeat 17,000 prompts. Each prompt already asks for a last line "Answer: ...".
    "BytedTsinghua-SIA/DAPO-Math-17k": Preset("math", "prompt", "reward_model.ground_truth", once=True),
    # The same questions without that request; `source_prompt` still has it.
    "open-r1/DAPO-Math-17k-Processed": Preset("math", "source_prompt", "solution", config="en", once=True),
    "openai/gsm8k": Preset(
        "numeric",
        "question",
        "answer",
        config="main",
        instruction="Think step by step, then finish with a line `Answer: <number>`.",
        answer_after="####",
    ),
}


def recommended_verifier(spec: str) -> str | None:
    """Return the verifier for the answers of a source. None when it is unknown."""
    if spec == "demo" or spec.startswith("demo:"):
        return "numeric"
    if spec.startswith("reasoning-gym:"):
        return "reasoning-gym"
    preset = PRESETS.get(spec.partition(":")[0])
    return preset.verifier if preset else None


def load_tasks(
    spec: str | PathLike[str],
    *,
    split: str | None = None,
    limit: int | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    conversational: bool = False,
    seed: int = 0,
    render: Callable[[Prompt], object] | None = None,
) -> datasets.Dataset:
    """Load tasks as a dataset with the columns `prompt`, `answer` (text) and all others of the source.

    Args:
        spec: the source; see the module docstring.
        split: split of the demo, a Hub dataset or a generated task (default `train`). A file has none.
        limit: number of usable rows to keep, from the first on; >= 1.
        prompt_column, answer_column: columns to use if the source has several candidates. Dots separate the names of
            nested columns.
        system_prompt: system message before every prompt, replacing the prompt's own; makes prompts conversational.
        conversational: turn plain prompts into one user message.
        seed: seed of `reasoning-gym:` tasks whose spec has none.
        render: called with the prompt of every task, in order; its ModelError is raised with the task's place.
    Raises: DataError, with file, row and column; ModelError of `render`. Rows that have no answer or are too long are
        skipped with a warning that counts them; if they are more than half, that is an error.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit = {limit}: keep at least 1 row, or omit it to keep all.")
    spec = fspath(spec)
    hub_id, _, config = spec.partition(":")
    preset = PRESETS.get(hub_id)
    default_config = config or (preset.config if preset else None)
    source = open_source(spec, split=split, config=default_config, seed=seed, limit=limit)
    if prompt_column or answer_column:
        preset = None
    first = list(islice(source.rows, _PEEK))
    if not first:
        raise DataError(f"dataset = {spec!r} has no rows. Check the file, or the split ({split or 'train'}).")
    columns = list(dict.fromkeys(name for _, row in first for name in row))
    plan = _Plan(
        source=source,
        prompt=prompt_column or (preset.prompt if preset else _pick("prompt", PROMPT_COLUMNS, columns, source)),
        answer=answer_column or (preset.answer if preset else _pick("answer", ANSWER_COLUMNS, columns, source)),
        preset=preset,
        system_prompt=system_prompt,
        conversational=conversational or system_prompt is not None,
        render=render,
    )
    plan.check_columns(columns)
    return _as_dataset(list(islice(plan.tasks(chain(first, source.rows)), limit)), plan)


def _pick(kind: str, candidates: Iterable[str], columns: list[str], source: Source) -> str:
    """Return the only column of the source among `candidates`. Raises: DataError for none or several."""
    found = [name for name in candidates if name.partition(".")[0] in columns]
    if len(found) > 1 and any("." not in name for name in found):
        found = [name for name in found if "." not in name]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{source.name}: columns {', '.join(map(repr, found))} could each be the {kind}. "
            f"Choose one with {option(kind)} {found[0]!r} (or the other)."
        )
    raise DataError(
        f"{source.name}: none of the columns {', '.join(map(repr, columns)) or '(it has none)'} is called "
        f"{' or '.join(repr(name) for name in candidates)}. Name the column of the {kind} with {option(kind)}."
    )


def option(kind: str) -> str:
    """Return the option that names the column of a `kind` (prompt, answer, completion): in Python, and as a flag."""
    return f"{kind}_column (--{kind}-column)"


@dataclass
class _Plan:
    """Conversion of raw rows to tasks, with counts of what was skipped."""

    source: Source
    prompt: str
    answer: str
    preset: Preset | None
    system_prompt: str | None
    conversational: bool
    render: Callable[[Prompt], object] | None = None
    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    dropped_columns: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)
    """Row numbers of the tasks in the source."""

    def check_columns(self, columns: list[str]) -> None:
        """Check that the chosen columns exist. Raises: DataError."""
        for kind, name in (("prompt", self.prompt), ("answer", self.answer)):
            if name.partition(".")[0] not in columns:
                raise DataError(
                    f"{self.source.name}: {name!r}, given as {option(kind)}, is not a column; it has "
                    f"{', '.join(map(repr, columns))}."
                )

    def tasks(self, rows: Iterable[tuple[int, Row]]) -> Iterator[Row]:
        """Yield the usable rows as tasks."""
        seen: set[str] = set()
        plain: bool | None = None
        for number, row in rows:
            self.read += 1
            answer = self._answer(number, row)
            if not answer:
                self.skipped["without an answer"] += 1
                continue
            prompt = self._prompt(number, row)
            if plain is not None and isinstance(prompt, str) != plain:
                raise self._error(number, self.prompt, row, "is plain text in some rows and messages in others")
            plain = isinstance(prompt, str)
            key = json.dumps(prompt)
            others = self._others(row)
            sizes = ((key, MAX_PROMPT_CHARS), (answer, MAX_ANSWER_CHARS), (json.dumps(others), MAX_ROW_CHARS))
            if any(len(text) > cap for text, cap in sizes):
                self.skipped["too long"] += 1
                continue
            if self.preset and self.preset.once:
                if key in seen:
                    continue
                seen.add(key)
            if self.render is not None:
                with placed(self.source, number, self.prompt):
                    self.render(prompt)
            self.numbers.append(number)
            yield {"prompt": prompt, "answer": answer, **others}

    def _prompt(self, number: int, row: Row) -> Prompt:
        try:
            prompt = read_prompt(reach(row, self.prompt))
        except Fault as fault:
            raise self._error(number, self.prompt, row, fault) from fault
        if isinstance(prompt, str):
            if self.preset and self.preset.instruction:
                prompt = f"{prompt.rstrip()}\n\n{self.preset.instruction}"
            if not self.conversational:
                return prompt
            prompt = [{"role": "user", "content": prompt}]
        prompt = with_system(prompt, self.system_prompt)
        if not has_user_turn(prompt):
            raise self._error(number, self.prompt, row, NO_USER_TURN)
        return prompt

    def _answer(self, number: int, row: Row) -> str:
        """Return the reference answer as text, or an empty string when the row has none."""
        try:
            text = read_answer(reach(row, self.answer))
        except Fault as fault:
            raise self._error(number, self.answer, row, fault) from fault
        if self.preset and self.preset.answer_after:
            text = text.rpartition(self.preset.answer_after)[2].strip() if self.preset.answer_after in text else ""
        return text

    def _others(self, row: Row) -> Row:
        """Return the other columns as JSON values. Columns that JSON cannot represent (images, bytes) are dropped."""
        others: Row = {}
        for name, value in row.items():
            if name == self.prompt or (name == self.answer and not (self.preset and self.preset.answer_after)):
                continue
            try:
                value = value if isinstance(value, str | int | float | None) else json.loads(json.dumps(value))
            except (TypeError, ValueError):
                self.dropped_columns.add(name)
                continue
            kept = name
            if name == self.answer:
                kept = "rationale"
            elif name in _RESERVED:
                kept = free_name(name, row)
                if name not in ("prompt", "answer"):
                    self.renamed[name] = kept
            others[kept] = value
        return others

    def _error(self, number: int, column: str, row: Row, fault: object) -> DataError:
        return row_error(self.source, number, column, reach(row, column), str(fault))


def reach(row: Row, column: str) -> Any:
    """Return the value of a column, or None when it is missing. Dots separate the names of nested columns."""
    value: Any = row
    for part in (column,) if column in row else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _as_dataset(tasks: list[Row], plan: _Plan) -> datasets.Dataset:
    from datasets import Dataset

    lost = sum(plan.skipped.values())
    counts = ", ".join(f"{count} {why}" for why, count in plan.skipped.items())
    if not tasks or lost * 2 > plan.read:
        raise DataError(
            f"{plan.source.name}: {lost} of {plan.read} rows cannot be used ({counts}). The answer was read from "
            f"column {plan.answer!r}; name another with {option('answer')}."
        )
    table = {name: [task.get(name) for task in tasks] for name in dict.fromkeys(n for task in tasks for n in task)}
    notes = [f"skipped {counts} of {plan.read} rows"] if lost else []
    if plan.dropped_columns:
        notes.append(f"dropped columns that JSON cannot represent: {', '.join(sorted(plan.dropped_columns))}")
    for name, kept in plan.renamed.items():
        notes.append(f"column {name!r} is called {kept!r}, since TRL passes values of its own as {name!r}")
    for name, values in table.items():
        at = next((i for i, value in enumerate(values) if isinstance(value, int) and value not in _INTEGERS), None)
        if at is not None:
            table[name] = [value if value is None else str(value) for value in values]
            where = f"{plan.source.unit} {plan.numbers[at]}"
            notes.append(f"column {name!r} is kept as text, since {where} has an integer beyond 64 bits")
    for note in notes:
        warnings.warn(f"{plan.source.name}: {note}.", stacklevel=3)
    if plan.source.repaired:
        warnings.warn(repair_note(plan.source), stacklevel=3)
    log.info("%s: %d tasks from %d rows", plan.source.name, len(tasks), plan.read)
    try:
        return Dataset.from_dict(table)
    except Exception as error:
        raise _column_error(table, plan) from error


def _has_large_integer(value: Any) -> bool:
    """Return True when a value holds an integer, at any depth, that does not fit 64 bits."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (isinstance(value, int) and value not in _INTEGERS) or any(map(_has_large_integer, items))


def _fits(values: list[Any]) -> bool:
    """Return True when the values have one type that a column can hold."""
    from datasets import Dataset

    try:
        Dataset.from_dict({"value": values})
    except Exception:
        return False
    return True


def _first_misfit(values: list[Any]) -> int:
    """Return the position of the first value that does not have the type of the values before it."""
    return bisect_left(range(len(values)), True, key=lambda i: not _fits(values[: i + 1]))


def _column_error(table: dict[str, list[Any]], plan: _Plan) -> DataError:
    """Return the error that names the first value which does not have the type of the values before it."""
    for name, values in table.items():
        if _fits(values):
            continue
        at = _first_misfit(values)
        kinds = Counter(type(value).__name__ for value in values if value is not None)
        fault = "has parts of other types than the rows before it; use one type for all rows"
        if not _fits([values[at]]):
            fault = "mixes types within one list or object; use one type, or write the value as text"
        if _has_large_integer(values[at]):
            fault = "has an integer beyond 64 bits inside; write it as text"
        elif len(kinds) > 1:
            fault = f"is of another type: the column mixes {' and '.join(kinds)}; use one type for all its values"
        column = plan.prompt if name == "prompt" else name
        return row_error(plan.source, plan.numbers[at], column, values[at], fault)
    return DataError(f"{plan.source.name}: its columns cannot be put into one table.")


__all__ = ["PRESETS", "Preset", "load_tasks", "recommended_verifier"]
