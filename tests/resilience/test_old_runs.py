"""Run folders that commit e85d9f3 left unfinished resume to the weights it would have reached, bit for bit.

`old_runs/make.py` wrote them. Machines whose arithmetic rounds otherwise, and other versions of the packages that
compute, are recognized by `old_runs/numerics.py`; there the weights may differ by rounding.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command_line import COMMAND
from trainers import digest
from warm_process import FIXED, run_warm

OLD_RUNS = Path(__file__).parent / "old_runs"
EXPECTED = json.loads((OLD_RUNS / "expected.json").read_text())
ROUNDING = 1e-5
"""Largest difference of a weight on other machines. Other instruction sets give 1.5e-8, another order of tasks 1e-3."""

Weights = dict[str, torch.Tensor]


def run(folder: Path, program: Path, *arguments: str) -> str:
    """Run a Python program in a folder, in the environment of the old runs; returns what it printed."""
    assert EXPECTED["environment"].items() <= (os.environ | FIXED).items()
    done = run_warm(program, *arguments, cwd=folder)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """True where the same program gives the bits it gave where the runs were written."""
    found: dict[str, str] = json.loads(run(tmp_path_factory.mktemp("numerics"), OLD_RUNS / "numerics.py"))
    assert found.keys() == EXPECTED["numerics"].keys()
    return found == EXPECTED["numerics"]


def furthest(ours: Weights, theirs: Weights) -> float:
    """Return the largest absolute difference of any weight."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def check(name: str, folder: Path, begun: Weights, final: Weights, *, exact: bool) -> None:
    """Compare the end of a resumed run with the end that the old code reaches."""
    recorded = load_file(OLD_RUNS / "final" / f"{name}.safetensors")
    assert digest(recorded) == EXPECTED[name]["weights"]
    assert furthest(final, recorded) < ROUNDING
    if exact:
        assert digest(final) == EXPECTED[name]["weights"]
    assert furthest(final, begun) > 100 * ROUNDING, "nothing was learned after the resume"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == list(range(1, 9)), "each step once"


@pytest.mark.slow
def test_an_old_run_from_python_ends_with_the_old_weights(tmp_path: Path, exact: bool) -> None:
    folder = Path(shutil.copytree(OLD_RUNS / "trainer", tmp_path / "trainer"))
    begun = load_file(folder / "run" / "checkpoint-4" / "adapter_model.safetensors")
    printed = json.loads(run(folder, OLD_RUNS / "scripted_run.py", "run", "--resume").splitlines()[-1])
    final = load_file(folder / "run" / "checkpoint-8" / "adapter_model.safetensors")
    check("trainer", folder / "run", begun, final, exact=exact)
    assert printed["lessons"] == EXPECTED["trainer"]["lessons"]
    if exact:
        assert printed["moments"] == EXPECTED["trainer"]["moments"]


@pytest.mark.slow
def test_an_old_run_from_the_command_line_ends_with_the_old_weights(tmp_path: Path, exact: bool) -> None:
    folder = Path(shutil.copytree(OLD_RUNS / "cli", tmp_path / "cli"))
    begun = load_file(folder / "run" / "checkpoint-5" / "adapter_model.safetensors")
    run(folder, COMMAND, "train", "--resume", "--output-dir", "run")
    final = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    check("cli", folder / "run", begun, final, exact=exact)
    assert furthest(load_file(folder / "run" / "checkpoint-8" / "adapter_model.safetensors"), final) == 0.0
