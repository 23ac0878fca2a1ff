"""Start runs on two processes whose weights are spread (spread_ranks.py), and read what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mel_lite.lessons.store import ExperienceStore

SCRIPT = Path(__file__).with_name("spread_ranks.py")


def launch(folder: Path, runs: dict[str, Any], environment: dict[str, str], *, sites: tuple[Path, ...] = ()) -> None:
    """Run two processes with these variables, and with `sites` on their path."""
    paths = [*map(str, sites), str(SCRIPT.parents[1]), str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(SCRIPT), str(folder),
         json.dumps(runs)],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-8000:]


def halved(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"per_device_train_batch_size": options.get("per_device_train_batch_size", 8) // 2}


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"weights-{rank}.safetensors")


def logged(folder: Path, *keys: str) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [[line.get(key) or 0.0 for key in keys] for line in lines if "reward" in line]


def stored(folder: Path) -> list[tuple[Any, ...]]:
    with ExperienceStore(folder / "run" / "experiences.sqlite", read_only=True) as store:
        return [(row.id, row.step, row.status, row.analysis, row.pair_index) for row in store.list()]
