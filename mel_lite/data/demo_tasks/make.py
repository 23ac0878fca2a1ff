"""Write the demo tasks: `python -m mel_lite.data.demo_tasks.make [folder]`.

The output is deterministic, byte for byte. No expression occurs twice, so no test question is a training question.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from mel_lite.data.demo_tasks import path
from mel_lite.data.demo_tasks.words import draw

SEED = 20261129
TRAIN, TEST = 400, 100


def make(train: Path, test: Path) -> None:
    """Write both files."""
    rng = random.Random(SEED)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < TRAIN + TEST:
        chain = draw(rng)
        rows.setdefault(chain.expression, {"prompt": chain.question, "answer": str(chain.answer)})
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    train.write_text("".join(lines[:TRAIN]), encoding="utf-8")
    test.write_text("".join(lines[TRAIN:]), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else path("train").parent
    make(folder / "train.jsonl", folder / "test.jsonl")
