"""Tasks of the demo, which its warm-started model solves sometimes: `train.jsonl` and `test.jsonl`."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "test")
INSTRUCTION = "Write one step per line, then `Answer: <number>`."
"""Text after every question."""
TEMPLATES = str(Path(__file__).with_name("templates.yaml"))
"""Short analysis and replay prompts, which the warm start was trained with."""


def path(split: str) -> Path:
    """Return the packaged file of a split, `train` or `test`. `python -m mel_lite.data.demo_tasks.make` writes it."""
    return Path(__file__).with_name(f"{split}.jsonl")
