"""Read the values of a row: prompts and reference answers. The same rules hold for files, commands and trainers."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from mel_lite.errors import DataError
from mel_lite.text import shorten
from mel_lite.types import Message, Prompt

ROLES = ("system", "developer", "user", "assistant", "tool")
REWARD_ARGUMENTS = (
    "prompts",
    "completions",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
    "mel_verdict",
    "self",
)
"""Names under which TRL and the verifier's reward pass values of their own to reward functions."""
IMAGE_COLUMNS = ("image", "images")
"""Columns that TRL takes for images."""


_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")


class Fault(Exception):
    """Raised for a value that cannot be used. The message follows the value: `is empty`."""


def read_prompt(value: Any) -> Prompt:
    """Return a prompt: plain text as it is, or messages as `read_message` returns them. Raises: Fault."""
    if isinstance(value, str) and value.strip():
        if _MESSAGES_AS_TEXT.match(value):
            raise Fault(
                "is a list of messages written as text; save the data as JSON Lines or Parquet, with real lists"
            )
        return value
    if isinstance(value, list) and value:
        turns = [_numbered_message(number, message) for number, message in enumerate(value, 1)]
        asked = [turn["content"] for turn in turns if turn["role"] == "user"]
        if asked and not any(text.strip() for text in asked):
            raise Fault("has no text in its user turn")
        return turns
    raise Fault("is empty" if value in (None, [], "") or isinstance(value, str) else "is neither text nor messages")


def _numbered_message(number: int, message: Any) -> Message:
    try:
        return read_message(message)
    except Fault as fault:
        raise Fault(f"{fault}; message {number} is {shorten(repr(message))}") from fault


def read_message(message: Any) -> Message:
    """Return a message with all its keys, such as `name` and `tool_calls`, since a chat template may read them.

    Keys that are null are left out. Null content is only valid with tool calls and becomes an empty text. A list of
    text parts becomes their text.

    Raises: Fault.
    """
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise Fault(f"has a message that is not {{'role': {'|'.join(ROLES)}, 'content': text}}")
    kept = {name: value for name, value in message.items() if value is not None}
    content, calls = kept.get("content"), kept.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise Fault("has a message whose tool_calls are not a list of objects")
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part_text(part) for part in content)
    if not isinstance(content, str):
        raise Fault(f"has a message that is not {{'role': {'|'.join(ROLES)}, 'content': text}}")
    try:
        json.dumps(kept)
    except (TypeError, ValueError) as error:
        raise Fault(f"has a message that JSON cannot represent ({error})") from error
    return kept | {"content": content}


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part["text"] if "text" in part else None, str):
        raise Fault(f"has a message with a part of type {kind!r}, but only text can be read")
    return part["text"]


def with_system(prompt: Prompt, system_prompt: str | None) -> Prompt:
    """Return the prompt with `system_prompt` as its only system message; unchanged without one."""
    if system_prompt is None:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system_prompt}, *(turn for turn in turns if turn["role"] != "system")]


def has_user_turn(prompt: Any) -> bool:
    """Return True for plain text, and for a conversation with a user turn."""
    return not isinstance(prompt, list) or any(turn.get("role") == "user" for turn in prompt)


NO_USER_TURN = "has no user turn, where a lesson would be put. Give the question the role 'user'"


def read_answer(value: Any) -> str:
    """Return a reference answer as text; empty for null, NaN and an empty list.

    Numbers with a whole value have no decimal point. A list counts as the answer if all its items are the same answer.

    Raises: Fault.
    """
    if isinstance(value, list):
        answers = {read_answer(item) for item in value}
        if len(answers) > 1:
            raise Fault(f"is a list of {len(answers)} different answers, but a task has one. Keep one of them")
        return answers.pop() if answers else ""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, Decimal) and value.is_finite():
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    if isinstance(value, float) and math.isinf(value):
        raise Fault("is a number too large to be read. Write it as text, in quotes")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        raise Fault(f"is a {type(value).__name__}, not a text or number")
    return str(value).strip()


def free_name(name: str, taken: Mapping[str, Any]) -> str:
    """Return the name under which a column with a reserved name is kept: `completions_original`."""
    name = f"{name}_original"
    while name in taken:
        name += "_"
    return name


# ---- datasets of the Python API ----


def check_kind(dataset: Any) -> None:
    """Refuse a list, a data frame or a file's name in place of a dataset. Raises: DataError."""
    if not (dataset is None or isinstance(dataset, dict) or hasattr(dataset, "column_names")):
        raise DataError(
            f"train_dataset is a {type(dataset).__name__}. Pass a Dataset: Dataset.from_list(rows), "
            "Dataset.from_pandas(frame), or mel_lite.data.load_tasks(file)."
        )


def check_dataset(dataset: Any, answer_column: str | None, *, lessons: bool, environments: bool = False) -> None:
    """Check the rows of a trainer's dataset by the rules for files. A streamed dataset is checked row by row in use.

    `lessons`: lessons are drawn, so that every prompt needs a user turn. `environments`: they may write the prompts.

    Raises: DataError with row and column.
    """
    if isinstance(dataset, dict):
        raise DataError(
            f"train_dataset is a {type(dataset).__name__} with the splits {', '.join(map(str, dataset))}. Pass one of "
            f"them: train_dataset=data[{next(iter(dataset), 'train')!r}]."
        )
    if not environments and dataset is not None and dataset.column_names and "prompt" not in dataset.column_names:
        raise DataError(
            f"train_dataset has no column 'prompt', only {', '.join(map(repr, dataset.column_names))}. Rename one: "
            f"train_dataset.rename_column({dataset.column_names[0]!r}, 'prompt')."
        )
    for number, value in column_cells(dataset, "prompt"):
        if _has_parts(value):
            continue  # text and images, for TRL's models that see
        try:
            read_prompt(value)
        except Fault as fault:
            raise _row_fault(number, "prompt", value, fault) from fault
    if answer_column is not None:
        for number, value in column_cells(dataset, answer_column):
            try:
                read_answer(value)
            except Fault as fault:
                raise _row_fault(number, answer_column, value, fault) from fault
    if lessons:
        for number, value in column_cells(dataset, "prompt"):
            if not has_user_turn(value):
                raise _row_fault(number, "prompt", value, NO_USER_TURN)


def _has_parts(prompt: Any) -> bool:
    turns = prompt if isinstance(prompt, list) else ()
    return any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns)


def column_cells(dataset: Any, name: str) -> Iterable[tuple[int, Any]]:
    """Return the cells of a column with their row numbers from 1; none of a streamed or transformed dataset."""
    if not (hasattr(dataset, "select_columns") and hasattr(dataset, "__len__")):
        return ()
    if dataset.format["type"] == "custom" or name not in dataset.column_names:
        return ()  # the columns of a transform exist only once it is applied
    return enumerate(dataset.with_format(None).select_columns([name])[name], 1)


def _row_fault(number: int, column: str, value: Any, fault: object) -> DataError:
    return DataError(f"train_dataset, row {number}, column {column!r}: {shorten(repr(value))} {fault}.")


def without_columns(dataset: Any, names: Iterable[str]) -> Any:
    """Return a trainer's dataset (or datasets by name) without the columns `names`, and warn of those it had."""
    if isinstance(dataset, dict):
        return {name: without_columns(one, names) for name, one in dataset.items()}
    if not hasattr(dataset, "remove_columns"):
        return dataset
    columns = dataset.column_names or list(next(iter(dataset), {}))
    taken = [name for name in names if name in columns]
    if not taken:
        return dataset
    warnings.warn(
        f"The dataset's columns {', '.join(map(repr, taken))} are left out: TRL passes its own values by these names. "
        "Rename them to read them in rewards and verifiers.",
        stacklevel=3,
    )
    return dataset.remove_columns(taken)
