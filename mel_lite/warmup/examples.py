"""Read and check the examples of a warm-up from JSONL, and tokenize them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mel_lite.errors import DataError
from mel_lite.models.chat import render
from mel_lite.types import Prompt

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Example:
    """Prompt and the completion to learn for it."""

    prompt: Prompt
    completion: str


def load_examples(file: Path) -> list[Example]:
    """Read a JSONL file of `{"prompt": text or messages, "completion": text}`. Other columns are ignored.

    Raises: DataError for a file that cannot be read or is empty, and for a malformed row, with file, line and column.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"examples={str(file)!r} cannot be read: {error}. Give a JSONL file in UTF-8.") from error
    examples = [_read_row(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise DataError(f"examples={str(file)!r} holds no examples. Write one JSON object per line.")
    return examples


def _read_row(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}). Write one object per line.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__}, not an object with `prompt` and `completion`.")
    for column in ("prompt", "completion"):
        if column not in row:
            raise DataError(f"{where}: column {column!r} is missing; it has {', '.join(map(repr, row)) or 'none'}.")
    return Example(_read_prompt(row["prompt"], where), _read_completion(row["completion"], where))


def _read_prompt(prompt: Any, where: str) -> Prompt:
    if isinstance(prompt, str):
        if not prompt:
            raise DataError(f"{where}, column 'prompt': empty. Give text or messages.")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}, column 'prompt': {_short(prompt)} is neither text nor a list of messages.")
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}, column 'prompt': message {number} is {_short(message)}; it must be an object with a `role` "
                "and `content` as text."
            )
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}, column 'prompt': message {number} has the role {_short(message.get('role'))}, which is not "
                f"one of {', '.join(ROLES)}."
            )
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}, column 'prompt': ends with an assistant turn. Move it to `completion`.")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _read_completion(completion: Any, where: str) -> str:
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        if completion[0].get("role") == "assistant":  # TRL's conversational form
            completion = completion[0].get("content")
    if not isinstance(completion, str) or not completion.strip():
        raise DataError(f"{where}, column 'completion': {_short(completion)} is not text to learn. Give a text.")
    return completion


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def tokenize(
    examples: Sequence[Example], tokenizer: Any, *, max_length_tokens: int, turn_end: int | None = None
) -> tuple[list[dict[str, list[int]]], int]:
    """Tokenize examples into `input_ids` and `labels` (-100 on the prompt).

    The prompt's ids equal those that a rollout starts from. The completion of a conversation ends with `turn_end`, the
    completion of plain text with the end-of-sequence id.

    Returns: the rows, and the number of examples that were too long and are left out.
    Raises: DataError when every example is too long.
    """
    rows, lengths = [], []
    for example in examples:
        prompt_ids = list(render(example.prompt, tokenizer))
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
