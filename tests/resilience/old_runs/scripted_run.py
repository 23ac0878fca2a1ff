"""The run in `trainer/`, from Python: `python scripted_run.py OUTPUT_DIR [--resume]`, in a copy of that folder.

Everything that decides its weights is spelled out here, so that a change of the tests' helpers is not taken for a
change of the training. The last line it prints is JSON: hashes of the optimizer's moments and of the stored lessons.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sqlite3
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from mel_lite import MELConfig, MELTrainer
from scripted import ScriptedEngine
from trainers import run_state

PAIRS = ((3, 2), (4, 3), (5, 9), (6, 5), (7, 8), (9, 9))
"""Summands of the tasks: three steps of two prompts are an epoch."""
OPTIONS: dict[str, Any] = {
    "verifier": "numeric",
    "verifier_workers": 1,
    "verifier_deadline_s": 60.0,  # a busy machine must not turn a verdict into an abstention
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 16,
    "analysis_max_tokens": 600,
    "max_steps": 8,
    "probe_max_diff": None,  # a scripted engine is no policy
    "save_strategy": "steps",
    "save_steps": 4,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 7,
}
ANALYSIS = (
    "The wrong solution differs from the right one {where}.\n\n"
    "## Critique\nIt took the sign for granted instead of reading it. The right solution named the operation first, "
    "which kept it safe. Name the operation before computing.\n\n"
    "## Reflection\nI rushed. I will read the operation before the numbers and check it once more.\n\n"
    "## Heuristics\n- If a question joins two numbers, then name the operation before computing anything.\n"
)
PLACES = ("when it reads the second number of the question", "at the sign", "in its last sentence")


def answer(prompt: str, rng: random.Random) -> str:
    """Return `Answer: a+b`, wrong one time in three."""
    a, b = map(int, re.findall(r"\d+", prompt)[-2:])
    return f"Answer: {a + b + (rng.random() < 1 / 3)}"


def analysis(rng: random.Random) -> str:
    """Return a well-formed analysis, or, one time in five, text that cannot be parsed."""
    return "I do not know." if rng.random() < 1 / 5 else ANALYSIS.format(where=rng.choice(PLACES))


def build(output_dir: str) -> MELTrainer:
    """Return the trainer; the base model is read from the working folder."""
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    model.config.max_position_embeddings = 8192
    tokenizer = AutoTokenizer.from_pretrained("base")
    tasks = [
        {"prompt": [{"role": "user", "content": f"What is {a} plus {b}?"}], "answer": str(a + b)} for a, b in PAIRS
    ]
    return MELTrainer(
        model,
        args=MELConfig(output_dir=output_dir, **OPTIONS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        engine=ScriptedEngine(tokenizer, answer=answer, analysis=analysis),
        train_dataset=Dataset.from_list(tasks),
    )


def lessons(store: Path) -> str:
    """Return the SHA-256 over what led to each stored lesson and what came of it; no column of prose or floats."""
    columns = (
        "id, step, prompt_hash, right_index, wrong_index, right_text, wrong_text, analysis, status, trained_tokens"
    )
    sha = hashlib.sha256()
    for row in sqlite3.connect(store).execute(f"SELECT {columns} FROM experiences ORDER BY id"):
        sha.update(json.dumps(row).encode() + b"\n")
    return sha.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    trainer = build(options.output_dir)
    trainer.train(resume_from_checkpoint=options.resume or None)
    store = Path(options.output_dir, "experiences.sqlite")
    print(json.dumps({"moments": run_state(trainer)["moments"], "lessons": lessons(store)}))


if __name__ == "__main__":
    main()
