"""Write the demo tasks: `python -m mel_lite.data.demo_tasks.make [folder]`. Needs the `gym` extra.

The output is deterministic, byte for byte. No expression occurs twice, so no test question is a training question.
"""

from __future__ import annotations

import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mel_lite.data.demo_tasks import INSTRUCTION, path

SEED = 20261122
ONE_DIGIT = {"min_digits": 1, "max_digits": 1}
FAMILIES: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("chain_sum", {"min_terms": 3, "max_terms": 3, **ONE_DIGIT}, 200, 50),
    ("chain_sum", {"min_terms": 4, "max_terms": 4, **ONE_DIGIT}, 200, 50),
)
"""(reasoning-gym task, its configuration, rows for training, rows for testing)."""
_POOL = 4_000


def rows(task: str, config: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Return the first `count` generated tasks with different expressions. Raises: ValueError if there are fewer."""
    import reasoning_gym

    seen: dict[str, dict[str, Any]] = {}
    dataset = reasoning_gym.create_dataset(task, seed=SEED, size=_POOL, **config)
    for index, entry in enumerate(dataset):
        expression = entry["metadata"]["expression"]
        options = "&".join(f"{name}={value}" for name, value in config.items())
        source = f"reasoning-gym=={version('reasoning-gym')} {task}?{options}&seed={SEED} [{index}]"
        prompt = f"What is {expression}? {INSTRUCTION}"
        seen.setdefault(expression, {"prompt": prompt, "answer": entry["answer"], "source": source})
        if len(seen) == count:
            return list(seen.values())
    raise ValueError(f"{task} {config} has only {len(seen)} different expressions, {count} are needed")


def make(train: Path, test: Path) -> None:
    """Write both files."""
    train_rows, test_rows = [], []
    for task, config, n_train, n_test in FAMILIES:
        family = rows(task, config, n_train + n_test)
        train_rows += family[:n_train]
        test_rows += family[n_train:]
    for file, content in ((train, train_rows), (test, test_rows)):
        random.Random(SEED).shuffle(content)
        file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else path("train").parent
    make(folder / "train.jsonl", folder / "test.jsonl")
