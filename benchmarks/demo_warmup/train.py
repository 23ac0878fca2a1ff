"""Train the demo adapter from scratch, on a CPU: `PYTHONPATH=benchmarks python -m demo_warmup.train FOLDER`.

Writes the examples, the run with its checkpoints, and `demo_adapter` in its shipped form to FOLDER.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from demo_warmup.lessons import COUNTS, SEED, write_examples
from mel_lite.models.adapters import RECORD, WEIGHTS, LoraSpec
from mel_lite.models.load import ModelSpec
from mel_lite.warmup.options import WarmupOptions
from mel_lite.warmup.train import warmup

# bfloat16 halves the time on CPUs that compute in it. The weights of the adapter are float32 during training.
MODEL = ModelSpec("demo", dtype="bfloat16")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODULES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)
# The lower third stays as it is: no gradient flows through it, which saves a third of the time.
LORA = LoraSpec(r=8, alpha=16, target_modules=[f"layers.{layer}.{name}" for layer in range(10, 30) for name in MODULES])
OPTIONS = WarmupOptions(epochs=1, batch_size=4, learning_rate=1.5e-3, warmup_steps=10, save_steps=50, seed=42)


def ship(adapter: Path, target: Path) -> None:
    """Copy the needed files of an adapter: weights as float16 (relative error at most 2^-11), without local paths."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.to(torch.float16) for name, tensor in load_file(adapter / WEIGHTS).items()}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values()), "float16 overflowed"
    target.mkdir(exist_ok=True)
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    (target / WEIGHTS).chmod(0o644)  # safetensors makes it readable for the owner only
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    record = json.loads((adapter / RECORD).read_text(encoding="utf-8"))
    record["base"]["dtype"] = "auto"  # the adapter fits the base in any float dtype
    (target / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    """Write the examples, train on them, and write the adapter with its recipe and examples."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = folder / "examples.jsonl"
    write_examples(examples)
    result = warmup(examples, folder / "adapter", model=MODEL, lora=LORA, options=OPTIONS, console=Console())
    ship(result.adapter, folder / "demo_adapter")
    recipe = {
        "base": asdict(MODEL),
        "lora": asdict(LORA),
        "training": asdict(OPTIONS),
        "data_seed": SEED,
        "examples": COUNTS,
        "completion_tokens": result.trained_tokens,
        "steps": result.steps,
        "final_loss_nats_per_token": round(result.final_loss_nats, 4),
        "training_s": round(result.took_s),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "examples_sha256": hashlib.sha256(examples.read_bytes()).hexdigest(),
    }
    archive = gzip.compress(examples.read_bytes(), mtime=0)  # without a time stamp the bytes are reproducible
    (folder / "demo_adapter" / "examples.jsonl.gz").write_bytes(archive)
    (folder / "demo_adapter" / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: PYTHONPATH=benchmarks python -m demo_warmup.train FOLDER")
    main(Path(sys.argv[1]))
