"""Fake `FastLanguageModel` of unsloth for tests of loading. It records its arguments in `asked`."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from mel_lite.models.adapters import LoraSpec, lora_config

asked: dict[str, Any] = {}
fails_with: list[Exception] = []
loads_without_vllm = False
"""True to load without vLLM although it was requested, as for models that vLLM does not serve."""
shortened_by = 0
"""Tokens by which vLLM's context is shorter than requested."""

PACKAGE = "import fake_unsloth\nfake_unsloth.record_import()\nfrom fake_unsloth import FastLanguageModel\n"
"""Source of a package `unsloth` that uses this module."""


def record_import() -> None:
    asked["standby at import"] = os.environ.get("UNSLOTH_VLLM_STANDBY")


class FastLanguageModel:
    @staticmethod
    def from_pretrained(**options: Any) -> tuple[Any, None]:
        asked.update(options)
        for error in fails_with:
            raise error
        model = AutoModelForCausalLM.from_pretrained(options["model_name"])
        if options.get("fast_inference") and not loads_without_vllm:
            granted = options["max_seq_length"] - shortened_by
            config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=granted))
            model.vllm_engine = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
        return model, None

    @staticmethod
    def get_peft_model(model: Any, **options: Any) -> Any:
        asked["lora"] = options
        return get_peft_model(model, lora_config(LoraSpec(r=options["r"])))
