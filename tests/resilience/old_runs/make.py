"""Write the run folders of this directory: `python make.py`, at commit e85d9f3 and not later.

The folders are runs that the code before the refactoring (flat modules, eleven mixins) left unfinished. Later code must
resume them to the weights that the old code reaches. Writing them again with later code would prove nothing, so this
script is kept as a record. It imports `main` from `mel_lite.cli` and replaces `MELTrainer._compute_loss`: names of that
commit. To repeat it, check out e85d9f3, copy this directory into it, and run there, without an accelerator:

    PYTHONSAFEPATH=1 PYTHONPATH=$PWD:$PWD/tests python tests/resilience/old_runs/make.py

It writes, next to itself:

    trainer/        a base model, and a run from Python whose power was cut in its fifth step (scripted_run.py)
    cli/            a base model, tasks, a verifier, and a run of `mel-lite train` that got SIGTERM in its sixth step
    final/          the weights at the end of each run, as the old code trained them without an interruption
    expected.json   their hashes, and the machine they are of

The old code itself must reach the same bits by resuming; nothing is kept otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from tiny_models import save_tiny
from trainers import digest

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONSAFEPATH": "1",
}
"""What a run is resumed with, so that most machines of one architecture compute the same bits."""
RECIPE: dict[str, Any] = {
    "model": {"name": "base", "dtype": "float32"},
    "lora": {"r": 4, "alpha": 8, "start_from": None},
    "data": {"train": "tasks.jsonl", "eval": "held_out.jsonl", "max_prompt_tokens": 60},
    "train": {
        "verifier": "byte_parity:is_even",
        "verifier_workers": 1,
        "verifier_deadline_s": 60.0,
        "max_steps": 8,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 12,
        "analysis_max_tokens": 24,
        "max_context_tokens": 480,
        "mel_train_on": "experience",
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "save_steps": 4,
        "save_total_limit": 1,
    },
    "eval": {"limit": 2, "k": 2},
    "export": {"format": None},
}
STOPPED = """
import os, signal
from mel_lite import MELTrainer
from {module} import main

original = MELTrainer._compute_loss

def stopped(self, model, inputs):
    if self.state.global_step == {finished_steps}:
        {stop}
    return original(self, model, inputs)

MELTrainer._compute_loss = stopped
main()
"""
POWER_CUT = STOPPED.format(module="scripted_run", finished_steps=4, stop='raise RuntimeError("power cut")')
"""One step into the second epoch of three steps; the lessons of the step it hits are in the store already."""
SIGTERM = STOPPED.format(module="mel_lite.cli", finished_steps=5, stop="os.kill(os.getpid(), signal.SIGTERM)")
"""Two steps into the second epoch."""
WEIGHTS = Path("checkpoint-8", "adapter_model.safetensors")


def python(folder: Path, *arguments: str | Path, status: int = 0) -> str:
    """Run Python in a folder; returns what it printed. Raises: AssertionError for another exit status."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def check_resumed(folder: Path) -> dict[str, str]:
    """Return the hash of the weights that `whole` and `resumed` end with. Raises: AssertionError when they differ."""
    (checkpoint,) = (folder / "run").glob("checkpoint-*")
    begun = digest(load_file(checkpoint / WEIGHTS.name))
    whole, resumed = (digest(load_file(folder / run / WEIGHTS)) for run in ("whole", "resumed"))
    assert begun != whole == resumed
    return {"weights": whole}


def make_trainer(folder: Path) -> dict[str, str]:
    """Write `base`, `run`, and that run to the end, `whole` and `resumed`; returns hashes of the end."""
    save_tiny(folder / "base", "llama", dtype="bfloat16", hidden=32, head_dim=8)
    script = HERE / "scripted_run.py"
    whole = python(folder, script, "whole").splitlines()[-1]
    python(folder, "-c", POWER_CUT, "run", status=1)
    shutil.copytree(folder / "run", folder / "resumed")
    assert python(folder, script, "resumed", "--resume").splitlines()[-1] == whole
    return check_resumed(folder) | json.loads(whole)


def make_cli(folder: Path) -> dict[str, str]:
    """Write the same folders, and tasks; returns the hash of the weights at the end."""
    save_tiny(folder / "base", "qwen3", dtype="bfloat16", hidden=32, head_dim=8)
    for name, count in (("tasks", 6), ("held_out", 2)):
        tasks = [{"prompt": f"What is {i} plus {count}?", "answer": str(i + count)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    begin = ("train", "--gpu", "cpu", "--config", "recipe.yaml", "--output-dir")
    python(folder, "-m", "mel_lite", *begin, "whole")
    python(folder, "-c", SIGTERM, *begin, "run", status=128 + signal.SIGTERM)
    (folder / "recipe.yaml").unlink()
    shutil.copytree(folder / "run", folder / "resumed")
    python(folder, "-m", "mel_lite", "train", "--resume", "--output-dir", "resumed")
    return check_resumed(folder)


def main() -> None:
    expected: dict[str, Any] = {"environment": ENVIRONMENT}
    expected["numerics"] = json.loads(python(HERE, HERE / "numerics.py"))
    (HERE / "final").mkdir(exist_ok=True)
    for name, make in (("trainer", make_trainer), ("cli", make_cli)):
        for made in ("base", "run"):
            shutil.rmtree(HERE / name / made, ignore_errors=True)
        (HERE / name).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(shutil.copytree(HERE / name, Path(temporary, name)))
            expected[name] = make(work)
            shutil.copyfile(work / "whole" / WEIGHTS, HERE / "final" / f"{name}.safetensors")
            unwanted = shutil.ignore_patterns("whole", "resumed", ".lock", "__pycache__")
            shutil.copytree(work, HERE / name, dirs_exist_ok=True, ignore=unwanted)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
