"""Small arithmetic tasks that the warm-started demo model solves sometimes: `train.jsonl` and `test.jsonl`."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "test")
INSTRUCTION = "Keep a running total, one step per line, and finish with `Answer: <number>`."
"""Text after every question."""


def path(split: str) -> Path:
    """Return the packaged file of a split, `train` or `test`. `python -m mel_lite.data.demo_tasks.make` writes it."""
    return Path(__file__).with_name(f"{split}.jsonl")
