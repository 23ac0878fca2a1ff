"""What `from unsloth import FastLanguageModel` gives in tests of loading: notes what it is asked for."""

from __future__ import annotations

import os
from typing import Any

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from mel_lite.adapters import LoraSpec, lora_config

asked: dict[str, Any] = {}
fails_with: list[Exception] = []

PACKAGE = "import fake_unsloth\nfake_unsloth.note_import()\nfrom fake_unsloth import FastLanguageModel\n"
"""Source of a package `unsloth` that stands on this module."""


def note_import() -> None:
    asked["standby at import"] = os.environ.get("UNSLOTH_VLLM_STANDBY")


class FastLanguageModel:
    @staticmethod
    def from_pretrained(**options: Any) -> tuple[Any, None]:
        asked.update(options)
        for error in fails_with:
            raise error
        return AutoModelForCausalLM.from_pretrained(options["model_name"]), None

    @staticmethod
    def get_peft_model(model: Any, **options: Any) -> Any:
        asked["lora"] = options
        return get_peft_model(model, lora_config(LoraSpec(r=options["r"])))
