"""LoRA adapters of tiny models, written to disk."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from mel_lite.models.adapters import LoraSpec, lora_config, write_fingerprint
from mel_lite.models.load import ModelSpec, load_base
from tiny_models import set_lora


def make_adapter(spec: ModelSpec, out: Path, config: LoraConfig | None = None, *, scale: float = 0.1) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(load_base(spec), config or lora_config(LoraSpec(r=4)))
    set_lora(model, scale)
    model.save_pretrained(out)
    write_fingerprint(out, model)
    return out
