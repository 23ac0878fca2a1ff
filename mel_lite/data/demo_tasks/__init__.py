"""Small arithmetic tasks the warm-started demo model answers right now and then: `train.jsonl` and `test.jsonl`."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "test")
INSTRUCTION = "Keep a running total, one step per line, and finish with `Answer: <number>`."
"""What stands behind every question."""


def path(split: str) -> Path:
    """The packaged file of a split, `train` or `test`; written by `python -m mel_lite.data.demo_tasks.make`."""
    return Path(__file__).with_name(f"{split}.jsonl")
