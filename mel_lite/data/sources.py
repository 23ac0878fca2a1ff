"""Open sources of rows: the packaged demo, files, generated tasks, the Hub. Each yields (row number, raw row)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from mel_lite.data import demo_tasks
from mel_lite.errors import DataError
from mel_lite.text import did_you_mean, first_line

Row = dict[str, Any]
GYM_INSTRUCTION = "Give the final answer between <answer> and </answer>."
GYM_SIZE = 500
"""Number of rows of a generated task if neither the spec nor the limit sets it."""
GYM_SPLIT_SEEDS = {"train": 0, "validation": 1_000_000_007, "test": 2_000_000_011}
"""Offsets of the seed, so that splits differ. Tasks with few questions can still repeat some across splits."""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows of one source, numbered from 1."""

    name: str
    rows: Iterator[tuple[int, Row]]
    unit: str = "row"
    """Unit of the row numbers: `row`, or `line` of a JSON Lines file."""


def open_source(spec: str, *, split: str | None, config: str | None, seed: int, limit: int | None) -> Source:
    """Open the source that `spec` names.

    Raises: DataError when there is no such source, and during iteration for a row that cannot be read.
    """
    kind, _, rest = spec.partition(":")
    if kind == "demo":
        return _open_demo(spec, rest or split or "train")
    if kind == "reasoning-gym":
        return _open_gym(spec, rest, split or "train", seed, limit)
    path = Path(spec)
    if path.suffix.lower() in _READERS:
        return _open_file(path, split)
    if path.is_file() or (spec.startswith((".", "/", "~")) and not path.is_dir()):
        raise DataError(f"dataset = {spec!r}: give a file ending in {', '.join(_READERS)}, or a folder in Hub layout.")
    return _open_hub(spec, kind, config, split or "train")


def _open_demo(spec: str, split: str) -> Source:
    if split not in demo_tasks.SPLITS:
        raise DataError(f"dataset = {spec!r}: the demo has no split {split!r}; it has {', '.join(demo_tasks.SPLITS)}.")
    return Source(f"demo:{split}", _read_jsonl(demo_tasks.path(split)), "line")


def _open_file(path: Path, split: str | None) -> Source:
    if not path.is_file():
        raise DataError(f"dataset = {str(path)!r}: there is no such file (looked in {Path.cwd()}).")
    if split not in (None, "train"):
        raise DataError(f"split = {split!r}: a file has no splits; put those rows into a separate file.")
    suffix = path.suffix.lower()
    return Source(path.name, _READERS[suffix](path), "line" if suffix == ".jsonl" else "row")


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(path, "line", number, _from_json(path, "line", number, line))


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    content = _from_json(path, "row", 1, path.read_bytes())
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise DataError(f"{path.name}: holds a {type(content).__name__}; a .json file must be a list of objects.")
    for number, value in enumerate(content, 1):
        yield number, _object(path, "row", number, value)


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            for number, row in enumerate(csv.DictReader(file), 1):
                if None in row:
                    raise DataError(f"{path.name}, row {number}: has more cells than the header has columns.")
                yield number, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}, row {number + 1}: is not readable as UTF-8 CSV ({error}).") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1_000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path.name}, row {number + 1}: is not readable as Parquet ({first_line(error)}).") from error


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _from_json(path: Path, unit: str, number: int, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        shown = content[:60].decode("utf-8", errors="replace").strip()
        raise DataError(f"{path.name}, {unit} {number}: {shown!r} is not JSON ({first_line(error)}).") from error


def _object(path: Path, unit: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{path.name}, {unit} {number}: {str(value)[:60]!r} is not an object with columns.")
    return value


def _open_gym(spec: str, rest: str, split: str, seed: int, limit: int | None) -> Source:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f'dataset = {spec!r} needs the package reasoning-gym ({error}): pip install "mel-lite[gym]".'
        ) from error
    task, _, query = rest.partition("?")
    if task not in DATASETS:
        near = did_you_mean(task, DATASETS, most=3)
        raise DataError(f"dataset = {spec!r}: reasoning-gym has no task {task!r}.{near}")
    if split not in GYM_SPLIT_SEEDS:
        raise DataError(f"split = {split!r}: generated tasks have {', '.join(GYM_SPLIT_SEEDS)}.")
    options = {name: _value(text) for name, text in parse_qsl(query, keep_blank_values=True)}
    try:
        size, task_seed = int(options.pop("size", limit or GYM_SIZE)), int(options.pop("seed", seed))
        if size < 1:
            raise ValueError(f"size = {size} must be at least 1")
        entries = reasoning_gym.create_dataset(task, seed=task_seed + GYM_SPLIT_SEEDS[split], size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise DataError(f"dataset = {spec!r}: {task} does not take these options ({first_line(error)}).") from error
    return Source(spec, _gym_rows(entries))


def _gym_rows(entries: Any) -> Iterator[tuple[int, Row]]:
    for number, entry in enumerate(entries, 1):
        prompt = f"{entry['question']}\n\n{GYM_INSTRUCTION}"
        yield number, {"prompt": prompt, "answer": entry["answer"], "gym_entry": json.dumps(entry, default=str)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _open_hub(spec: str, hub_id: str, config: str | None, split: str) -> Source:
    """Open a dataset of the Hub, or a folder in Hub layout: `datasets` looks for the folder first."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(hub_id, config, split=split)
    except Exception as error:
        raise DataError(
            f"dataset = {spec!r}, split {split!r}: could not be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {first_line(error)}). Check the id and the network; for your own data, give "
            f"a file ending in {', '.join(_READERS)}; 'demo' needs no network."
        ) from error
    return Source(spec, _arrow_rows(dataset))


def _arrow_rows(dataset: Any) -> Iterator[tuple[int, Row]]:
    """Yield rows as plain Python objects, converted 1,000 at a time, which is several times faster than one by one."""
    number = 0
    for table in dataset.with_format("arrow").iter(1_000):
        for row in table.to_pylist():
            number += 1
            yield number, row
