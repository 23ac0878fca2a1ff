"""A trainer as `mel-lite probe` builds it, with a scripted policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mel_lite import MELConfig
from mel_lite.run.probe.run import probe_options
from scripted import ScriptedEngine
from tiny_models import set_lora, tiny_tokenizer
from trainers import build, sums

TRAIN = {"num_generations": 4, "per_device_train_batch_size": 8, "verifier_deadline_s": 60.0}


def build_probe(folder: Path, **options: Any) -> Any:
    """6 batches of 2 prompts x 4 completions; the adapter is not zero."""
    args = MELConfig(output_dir=str(folder / "unused"), use_cpu=True, bf16=False, **TRAIN)
    changed = probe_options(TRAIN, args, 12)
    trainer = build(folder, train_dataset=sums(12), engine=ScriptedEngine(tiny_tokenizer()), **changed | options)
    set_lora(trainer.model, 0.2)
    return trainer
