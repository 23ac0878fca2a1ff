"""The model that the tests of the engines share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mel_lite.training.scoring import install_scoring_head
from tiny_models import save_tiny, set_lora


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny float32 model with the scoring head and a LoRA adapter that is not zero."""
    base = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("tiny")), dtype=torch.float32)
    install_scoring_head(base)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    set_lora(adapted, 0.3)
    return adapted
