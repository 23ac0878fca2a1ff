"""The demo's shipped adapter matches its recipe, and its examples are what the generator writes."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from dataclasses import asdict

import torch
from safetensors.torch import load_file

from demo_warmup import train
from demo_warmup.lessons import COUNTS, SEED, make_examples
from mel_lite.models.adapters import WEIGHTS
from mel_lite.models.demo import DEMO_ADAPTER


def test_the_shipped_adapter_matches_its_recipe() -> None:
    weights = load_file(DEMO_ADAPTER / WEIGHTS)
    assert (DEMO_ADAPTER / WEIGHTS).stat().st_size <= 6_000_000
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    recipe = json.loads((DEMO_ADAPTER / "recipe.json").read_text())
    assert (recipe["data_seed"], recipe["examples"]) == (SEED, COUNTS)
    assert recipe["lora"]["r"] == train.LORA.r == weights[next(n for n in weights if "lora_A" in n)].shape[0]
    assert recipe["training"] == asdict(train.OPTIONS)
    examples = gzip.decompress((DEMO_ADAPTER / "examples.jsonl.gz").read_bytes())
    assert hashlib.sha256(examples).hexdigest() == recipe["examples_sha256"]
    kinds = Counter(json.loads(line)["kind"] for line in examples.decode().splitlines())
    assert kinds == COUNTS
    assert examples.decode() == "".join(json.dumps(example) + "\n" for example in make_examples())
    config = json.loads((DEMO_ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == train.BASE
