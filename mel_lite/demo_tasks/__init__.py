"""Small arithmetic tasks a 135M-parameter model answers right now and then: `train.jsonl` and `test.jsonl`."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "test")


def path(split: str) -> Path:
    """The packaged file of a split, `train` or `test`; written by `python -m mel_lite.demo_tasks.make`."""
    return Path(__file__).with_name(f"{split}.jsonl")
