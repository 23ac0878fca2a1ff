"""Train the demo adapter from scratch, on a CPU: `PYTHONPATH=benchmarks python -m demo_warmup.train FOLDER`.

Writes the examples, the run with its checkpoints, and `demo_adapter` in its shipped form to FOLDER. A run that was
interrupted is ended with new examples: `python -m demo_warmup.train NEW_FOLDER --from FOLDER/adapter/checkpoint-150`.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from demo_warmup.lessons import COUNTS, REST_COUNTS, REST_SEED, SEED, write_examples
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
OPTIONS = WarmupOptions(epochs=1, batch_size=4, learning_rate=2e-3, warmup_steps=10, save_steps=50, seed=42)
# To end an interrupted run: the optimizer starts anew, at about half of the rate, which is where the cosine was.
REST = replace(OPTIONS, learning_rate=1e-3, warmup_steps=5, save_steps=20)


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


def main(folder: Path, start: Path | None) -> None:
    """Write examples, train on them from scratch or from `start`, write the adapter with its recipe and examples."""
    folder.mkdir(parents=True, exist_ok=True)
    first, rest = folder / "examples.jsonl", folder / "rest.jsonl"
    write_examples(first)
    if start is None:
        result = warmup(first, folder / "adapter", model=MODEL, lora=LORA, options=OPTIONS, console=Console())
    else:
        write_examples(rest, REST_COUNTS, seed=REST_SEED)
        result = warmup(rest, folder / "adapter", model=MODEL, adapter=start, options=REST, console=Console())
    ship(result.adapter, folder / "demo_adapter")
    used = b"".join(file.read_bytes() for file in (first, rest) if file.is_file())
    ended = {
        "interrupted_at": None if start is None else start.name,
        "training": asdict(REST),
        "data_seed": REST_SEED,
        "examples": REST_COUNTS,
    }
    recipe = {
        "base": asdict(MODEL),
        "lora": asdict(LORA),
        "training": asdict(OPTIONS),
        "data_seed": SEED,
        "examples": COUNTS,
        "ended": None if start is None else ended,
        "steps": result.steps,
        "final_loss_nats_per_token": round(result.final_loss_nats, 4),
        "training_s": round(result.took_s),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "examples_sha256": hashlib.sha256(used).hexdigest(),
    }
    archive = gzip.compress(used, mtime=0)  # without a time stamp the bytes are reproducible
    (folder / "demo_adapter" / "examples.jsonl.gz").write_bytes(archive)
    (folder / "demo_adapter" / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="start", type=Path, help="checkpoint of an interrupted run")
    given = parser.parse_args()
    main(given.folder, given.start)
