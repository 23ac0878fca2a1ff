"""F8 and F13 on two processes: a fault of one rank leads to the same decision on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.nonfinite import BAD_STEPS
from tiny_models import save_tiny

SCRIPT = Path(__file__).parents[1] / "helpers" / "fault_ranks.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "end", "saved"),
    [
        ("nan on one", "0 4 1", ["checkpoint-4"]),
        ("nan three times", "5 3 3", []),
        # The signal comes in the third step's forward; both ranks handle it at the next micro-batch.
        ("signal to one", "143 3 0", ["checkpoint-3"]),
    ],
)
def test_both_take_the_same_decision(tmp_path: Path, fault: str, end: str, saved: list[str]) -> None:
    save_tiny(tmp_path / "base")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path), fault], env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert [(tmp_path / f"end-{rank}.txt").read_text() for rank in (0, 1)] == [end] * 2
    weights = [load_file(tmp_path / f"weights-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(w.isfinite().all() for w in weights[0].values())
    assert [path.name for path in checkpoint_files.committed(tmp_path / "run")] == saved
    for path in checkpoint_files.committed(tmp_path / "run"):
        assert checkpoint_files.problem(path) is None
        assert {"rng_state_0.json", "rng_state_1.json"} <= {p.name for p in path.iterdir()}
    if "nan" in fault:
        # The rank whose loss was NaN records the batch; the other rank's batch has no fault.
        dumped = [path.parent.name for path in (tmp_path / "run" / BAD_STEPS).glob("step-2-*/batch.json")]
        assert dumped == ["step-2-process-1"]
