"""Read and check the examples of a warm-up, and tokenize them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mel_lite.data.cells import Fault, read_message, read_prompt, with_system
from mel_lite.data.files import PROMPT_COLUMNS, SUFFIXES, Source, placed, read_lines, repair_note, row_error
from mel_lite.data.sources import open_source
from mel_lite.data.tasks import option
from mel_lite.errors import DataError
from mel_lite.models.chat import render
from mel_lite.types import Prompt


@dataclass(frozen=True, slots=True)
class Example:
    """Prompt and the completion to learn for it."""

    prompt: Prompt
    completion: str
    place: tuple[Source, int, str] | None = field(default=None, compare=False)
    """Source, row number and column of the prompt."""


def load_examples(
    source: Path | str,
    *,
    split: str | None = None,
    prompt_column: str | None = None,
    completion_column: str = "completion",
    system_prompt: str | None = None,
) -> list[Example]:
    """Read examples by the rules for tasks: prompt (text or messages), completion (text, or one assistant message).

    Args:
        source: as `spec` of `mel_lite.data.tasks.load_tasks`. A file of unknown ending is read as JSON Lines.
        split: split of a Hub dataset.
        prompt_column: None = `prompt`, `question` or `problem`.
        system_prompt: system message before every prompt, replacing the prompt's own; makes prompts conversational.
    Raises: DataError for a source that cannot be read or is empty, and for a malformed row, with row and column.
    """
    rows = _open(source, split)
    examples = []
    for number, row in rows.rows:
        column = prompt_column or next((name for name in PROMPT_COLUMNS if name in row), PROMPT_COLUMNS[0])
        for kind, name in (("prompt", column), ("completion", completion_column)):
            if name not in row:
                raise DataError(
                    f"{rows.name}, {rows.unit} {number}: column {name!r} is missing; it has "
                    f"{', '.join(map(repr, row)) or 'none'}. Name another with {option(kind)}."
                )
        for name, read in ((column, _read_prompt), (completion_column, _read_completion)):
            try:
                row[name] = read(row[name])
            except Fault as fault:
                raise row_error(rows, number, name, row[name], str(fault)) from fault
        prompt = with_system(row[column], system_prompt)
        examples.append(Example(prompt, row[completion_column], (rows, number, column)))
    if not examples:
        raise DataError(f"{rows.name} holds no examples. Write one JSON object per line.")
    if rows.repaired:
        warnings.warn(repair_note(rows), stacklevel=2)
    return examples


def _open(source: Path | str, split: str | None) -> Source:
    path = Path(source)
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        return read_lines(path)
    return open_source(str(source), split=split, config=str(source).partition(":")[2] or None, seed=0, limit=None)


def _read_prompt(value: Any) -> Prompt:
    prompt = read_prompt(value)
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise Fault("ends with an assistant turn. Move it to the completion")
    return prompt


def _read_completion(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        if value[0].get("role") == "assistant":  # TRL's conversational form
            value = read_message(value[0])["content"]
    if not isinstance(value, str) or not value.strip():
        raise Fault("is not text to learn")
    return value


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length_tokens: int,
    turn_end: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, list[int]]], int]:
    """Tokenize examples into `input_ids` and `labels` (-100 on the prompt).

    The prompt's ids equal those that a rollout starts from. The completion of a conversation ends with `turn_end`, the
    completion of plain text with the end-of-sequence id.

    Returns: the rows, and the number of examples that were too long and are left out.
    Raises: DataError when every example is too long; ModelError for a conversation that the chat template rejects.
    """
    rows, lengths = [], []
    for example in examples:
        with placed(*example.place) if example.place else nullcontext():
            prompt_ids = list(render(example.prompt, tokenizer, chat_template_kwargs=chat_template_kwargs))
        end = tokenizer.eos_token_id if isinstance(example.prompt, str) or turn_end is None else turn_end
        completion_ids = [*tokenizer(example.completion, add_special_tokens=False)["input_ids"], end]
        lengths.append(len(prompt_ids) + len(completion_ids))
        if lengths[-1] <= max_length_tokens:
            labels = [-100] * len(prompt_ids) + completion_ids
            rows.append({"input_ids": prompt_ids + completion_ids, "labels": labels})
    if not rows:
        raise DataError(
            f"None of the {len(examples)} examples fits {max_length_tokens} tokens; the shortest has {min(lengths)}. "
            "Shorten them, or raise max_length_tokens if the model's context allows it."
        )
    return rows, len(examples) - len(rows)


__all__ = ["Example", "load_examples", "tokenize"]
