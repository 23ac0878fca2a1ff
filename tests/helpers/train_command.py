"""One step of the command `mel-lite train` on a tiny model, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mel_lite.cli.main import app
from tiny_models import save_tiny
from warm_pool import warm_verifiers


def task_settings(folder: Path) -> dict[str, Any]:
    """Make a tiny model and four tasks in `folder`, and return the options of a short run on them."""
    save_tiny(folder / "base", "qwen3")
    tasks = [{"prompt": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(4)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return {
        "model.name": folder / "base", "model.dtype": "float32", "lora.start_from": "null",
        "data.train": folder / "tasks.jsonl", "data.eval": "null", "data.eval_split": "null",
        "data.max_prompt_tokens": 60, "train.max_completion_length": 8, "train.analysis_max_tokens": 16,
        "train.max_context_tokens": 480, "train.max_steps": 1, "train.per_device_train_batch_size": 8,
        "train.gradient_accumulation_steps": 1, "train.verifier": "numeric", "export.format": "null",
    }  # fmt: skip


def command(folder: Path, *flags: str, **settings: Any) -> Any:
    """One step of `mel-lite train` in `folder`."""
    values = task_settings(folder) | {key.replace("__", "."): value for key, value in settings.items()}
    options = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    with warm_verifiers():
        done = CliRunner().invoke(app, ["train", "--gpu", "cpu", *flags, *options, "--output-dir", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return done
