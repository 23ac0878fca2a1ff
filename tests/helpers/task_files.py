"""Task files of every format, and the tasks they hold."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

ROWS = [{"question": f"{i} + 1?", "answer": i + 1, "level": i % 2} for i in range(6)]

EXPECTED = [{"prompt": f"{i} + 1?", "answer": str(i + 1), "level": i % 2} for i in range(6)]


def write(path: Path, rows: list[Any]) -> str:
    """Write rows in the format of the file name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return str(path)
