"""Load tasks from any source into rows of `prompt` and `answer`, ready for TRL's GRPOTrainer.

    source -> raw rows -> (preset or columns) -> prompt, answer, the other columns -> checks -> datasets.Dataset

Sources (`spec`): `demo`, `demo:test`; a .jsonl, .json, .csv or .parquet file; `reasoning-gym:<task>?size=500&seed=1`
with any option of the task; a Hub id (or a folder in Hub layout), `hub_id:config` for one of its configurations. A
dataset's scripts are never run.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from mel_lite.data.sources import Row, Source, open_source
from mel_lite.errors import DataError
from mel_lite.text import shorten
from mel_lite.types import Message, Prompt

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
MAX_PROMPT_CHARS = 100_000
"""Longest prompt, as JSON with all its messages. Rows with a longer one are skipped and counted."""
MAX_ROW_CHARS = 1_000_000
"""Largest size of a row's other columns as JSON. Larger rows are skipped and counted."""
MAX_ANSWER_CHARS = 20_000
"""Longest reference answer. Rows with a longer one are skipped and counted."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_PEEK = 100


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
    spec: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    conversational: bool = False,
    seed: int = 0,
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
    Raises: DataError, with file, row and column. Rows that have no answer or are too long are skipped with a warning
        that counts them; if they are more than half, that is an error.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit = {limit}: keep at least 1 row, or omit it to keep all.")
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
            f"Choose one with {kind}_column = {found[0]!r} (or the other)."
        )
    raise DataError(
        f"{source.name}: none of the columns {', '.join(map(repr, columns))} is called "
        f"{' or '.join(repr(name) for name in candidates)}. Name the column of the {kind} with {kind}_column."
    )


@dataclass
class _Plan:
    """Conversion of raw rows to tasks, with counts of what was skipped."""

    source: Source
    prompt: str
    answer: str
    preset: Preset | None
    system_prompt: str | None
    conversational: bool
    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    dropped_columns: set[str] = field(default_factory=set)

    def check_columns(self, columns: list[str]) -> None:
        """Check that the chosen columns exist. Raises: DataError."""
        for option, name in (("prompt_column", self.prompt), ("answer_column", self.answer)):
            if name.partition(".")[0] not in columns:
                raise DataError(
                    f"{self.source.name}: {option} = {name!r} is not a column; it has {', '.join(map(repr, columns))}."
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
            yield {"prompt": prompt, "answer": answer, **others}

    def _prompt(self, number: int, row: Row) -> Prompt:
        value = reach(row, self.prompt)
        if isinstance(value, str) and value.strip():
            if self.preset and self.preset.instruction:
                value = f"{value.rstrip()}\n\n{self.preset.instruction}"
            return self._messages([{"role": "user", "content": value}]) if self.conversational else value
        if isinstance(value, list) and value:
            return self._messages([self._message(number, row, message) for message in value])
        fault = "is empty" if value in (None, [], "") or isinstance(value, str) else "is neither text nor messages"
        raise self._error(number, self.prompt, row, fault)

    def _message(self, number: int, row: Row, message: Any) -> Message:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in _ROLES or not isinstance(content, str):
            fault = f"has a message that is not {{'role': {'|'.join(_ROLES)}, 'content': text}}"
            raise self._error(number, self.prompt, row, fault)
        return {"role": role, "content": content}

    def _messages(self, messages: list[Message]) -> list[Message]:
        if self.system_prompt is None:
            return messages
        return [{"role": "system", "content": self.system_prompt}, *(m for m in messages if m["role"] != "system")]

    def _answer(self, number: int, row: Row) -> str:
        """Return the reference answer as text, or an empty string when the row has none."""
        value = reach(row, self.answer)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, str | int | float):
            raise self._error(number, self.answer, row, f"is a {type(value).__name__}, not a text or number")
        text = str(value).strip()
        if self.preset and self.preset.answer_after:
            text = text.rpartition(self.preset.answer_after)[2].strip() if self.preset.answer_after in text else ""
        return text

    def _others(self, row: Row) -> Row:
        """Return the other columns as JSON values. Columns that JSON cannot represent (images, bytes) are dropped."""
        others: Row = {}
        for name, value in row.items():
            if name in (self.prompt, self.answer) and not (self.preset and self.preset.answer_after):
                continue
            if name == self.prompt:
                continue
            kept = "rationale" if name == self.answer else f"{name}_original" if name in ("prompt", "answer") else name
            try:
                others[kept] = value if isinstance(value, str | int | float | None) else json.loads(json.dumps(value))
            except (TypeError, ValueError):
                self.dropped_columns.add(name)
        return others

    def _error(self, number: int, column: str, row: Row, fault: str) -> DataError:
        value = shorten(repr(reach(row, column)))
        return DataError(f"{self.source.name}, {self.source.unit} {number}, column {column!r}: {value} {fault}.")


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
            f"column {plan.answer!r}; name another with answer_column."
        )
    if lost:
        warnings.warn(f"{plan.source.name}: skipped {counts} of {plan.read} rows.", stacklevel=3)
    if plan.dropped_columns:
        names = ", ".join(sorted(plan.dropped_columns))
        warnings.warn(f"{plan.source.name}: dropped columns that JSON cannot represent: {names}.", stacklevel=3)
    log.info("%s: %d tasks from %d rows", plan.source.name, len(tasks), plan.read)
    table = {name: [task.get(name) for task in tasks] for name in dict.fromkeys(n for task in tasks for n in task)}
    try:
        return Dataset.from_dict(table)
    except Exception as error:
        raise DataError(f"{plan.source.name}: {_mixed_column(table)}.") from error


def _mixed_column(table: dict[str, list[Any]]) -> str:
    """Return the message about the column with values of different types."""
    for name, values in table.items():
        kinds = Counter(type(value).__name__ for value in values if value is not None)
        if len(kinds) > 1:
            return f"column {name!r} mixes {' and '.join(kinds)}; use one type for all its values"
    return "a nested column has values of different types in different rows; use one type"


__all__ = ["PRESETS", "Preset", "load_tasks", "recommended_verifier"]
