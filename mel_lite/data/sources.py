"""Open sources of rows: the packaged demo, files, generated tasks, the Hub. Each yields (row number, raw row)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from mel_lite.data import demo_tasks
from mel_lite.data.files import SUFFIXES, Row, Source, open_file, read_lines
from mel_lite.errors import DataError
from mel_lite.imports import install_command
from mel_lite.text import did_you_mean, first_line

GYM_INSTRUCTION = "Give the final answer between <answer> and </answer>."
GYM_SIZE = 500
"""Number of rows of a generated task if neither the spec nor the limit sets it."""
GYM_SPLIT_SEEDS = {"train": 0, "validation": 1_000_000_007, "test": 2_000_000_011}
"""Offsets of the seed, so that splits differ. Tasks with few questions can still repeat some across splits."""


_OTHER_FILES = frozenset(".tsv .txt .ndjson .xlsx .xls .arrow .feather .yaml .yml .pkl .gz .zip .bz2 .xz .zst".split())
"""Suffixes of data files that are not read. Ids of the Hub do not end in them."""


def open_source(spec: str, *, split: str | None, config: str | None, seed: int, limit: int | None) -> Source:
    """Open the source that `spec` names.

    Raises: DataError when there is no such source, and during iteration for a row that cannot be read.
    """
    if not spec.strip():
        raise DataError(f"dataset = {spec!r} is empty: give a file, a Hub id or 'demo'.")
    if "://" in spec:
        raise DataError(f"dataset = {spec!r} is a URL. Download the file, and give its path.")
    kind, _, rest = spec.partition(":")
    if kind == "demo":
        return _open_demo(spec, rest or split or "train")
    if kind == "reasoning-gym":
        return _open_gym(spec, rest, split or "train", seed, limit)
    path = Path(spec)
    if path.suffix.lower() in SUFFIXES:
        return _open_file(path, split)
    if Path(kind).suffix.lower() in SUFFIXES:
        raise DataError(f"dataset = {spec!r}: a file has no {rest!r}; give {kind!r}, with all its rows.")
    if (
        path.is_file()
        or path.suffix.lower() in _OTHER_FILES
        or (spec.startswith((".", "/", "~")) and not path.is_dir())
    ):
        raise DataError(f"dataset = {spec!r}: give a file ending in {', '.join(SUFFIXES)}, or a folder in Hub layout.")
    return _open_hub(spec, kind, config, split or "train")


def _open_demo(spec: str, split: str) -> Source:
    if split not in demo_tasks.SPLITS:
        raise DataError(f"dataset = {spec!r}: the demo has no split {split!r}; it has {', '.join(demo_tasks.SPLITS)}.")
    return replace(read_lines(demo_tasks.path(split)), name=f"demo:{split}")


def _open_file(path: Path, split: str | None) -> Source:
    if path.is_dir():
        raise DataError(f"dataset = {str(path)!r} is a folder. Give one of its files.")
    if not path.is_file():
        raise DataError(f"dataset = {str(path)!r}: there is no such file (looked in {Path.cwd()}).")
    if split not in (None, "train"):
        raise DataError(f"split = {split!r}: a file has no splits; put those rows into a separate file.")
    return open_file(path)


def _open_gym(spec: str, rest: str, split: str, seed: int, limit: int | None) -> Source:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"dataset = {spec!r} needs the package reasoning-gym ({error}). "
            f"Install it with: {install_command('gym')} (one of its parts needs a C compiler)."
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
    """Open a dataset of the Hub, a folder in Hub layout (`datasets` looks for it first), or one of `save_to_disk`."""
    from datasets import load_dataset, load_from_disk

    try:
        if any((Path(hub_id) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            dataset = load_from_disk(hub_id)
        else:
            dataset = load_dataset(hub_id, config, split=split)
    except Exception as error:
        raise DataError(
            f"dataset = {spec!r}, split {split!r}: could not be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {first_line(error)}). Check the id and the network; for your own data, give "
            f"a file ending in {', '.join(SUFFIXES)}; 'demo' needs no network."
        ) from error
    if isinstance(dataset, dict):  # a DatasetDict, as `save_to_disk` writes it
        if split not in dataset:
            raise DataError(f"dataset = {spec!r} has no split {split!r}; it has {', '.join(dataset)}.")
        dataset = dataset[split]
    return Source(spec, _arrow_rows(dataset))


def _arrow_rows(dataset: Any) -> Iterator[tuple[int, Row]]:
    """Yield rows as plain Python objects, converted 1,000 at a time, which is several times faster than one by one."""
    number = 0
    for table in dataset.with_format("arrow").iter(1_000):
        for row in table.to_pylist():
            number += 1
            yield number, row
