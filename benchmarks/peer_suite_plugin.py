"""Pytest plugin of peer_suite.py: tiny stand-ins for the Hub's models and texts, and the class under test."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

OWNER = "trl-internal-testing"
COMMIT = 40 * "0"
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320, "max_position_embeddings": 2048,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
MODELS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", False, {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", True, {}),
    "tiny-Qwen3ForCausalLM": ("qwen3", False, {}),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", True, {}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", False, EXPERTS),
    "tiny-LlamaForCausalLM-3.2": ("llama", False, {}),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", True, {}),
    "tiny-MistralForCausalLM-0.2": ("mistral", False, {}),
    "tiny-Gemma2ForCausalLM": ("gemma2", False, {}),
    "tiny-Cohere2ForCausalLM": ("cohere2", False, {"logit_scale": 0.125}),
    "tiny-GptOssForCausalLM": (
        "gpt_oss", False, {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
    ),
    "tiny-Glm4MoeForCausalLM": (
        "glm4_moe", False, {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    ),
}  # fmt: skip
"""Hub name -> model type, classifier or not, further options of its config."""
TEMPLATES = {"qwen2": "qwen2_5.jinja", "qwen3": "qwen3.jinja", "qwen3_moe": "qwen3.jinja"}


def build(name: str, folder: Path) -> None:
    """Write the random model `name` with a byte-level tokenizer."""
    kind, classifies, options = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | options | ({"num_labels": 1} if classifies else {})))
    auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = SIZES["max_position_embeddings"]
    template = Path(trl.__file__).parent / "chat_templates" / TEMPLATES.get(kind, "")
    tokenizer.chat_template = template.read_text() if template.is_file() else CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def fill_cache(cache: Path) -> None:
    """Write every model into an empty Hub cache, where offline loading finds it under its id.

    A model that the installed transformers cannot build is named; its tests fail with both classes.
    """
    for name in MODELS:
        home = cache / f"models--{OWNER}--{name}"
        try:
            build(name, home / "snapshots" / COMMIT)
        except Exception as error:
            print(f"{name} cannot be built here: {type(error).__name__}: {error}")
            continue
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)


def texts(config: str) -> datasets.DatasetDict:
    """Return prompts in the form of TRL's dataset `zen`: the beginnings of Python's aphorisms."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        import this
    lines = codecs.decode(this.s, "rot13").splitlines()[2:]
    prompts: list[Any] = [" ".join(line.split()[:4]) for line in lines]
    if config.startswith("conversational"):
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    whole = datasets.Dataset.from_dict({"prompt": prompts})
    return datasets.DatasetDict(train=whole.select(range(17)), test=whole.select(range(17, len(whole))))


def load_dataset(path: str, name: str = "", split: str | None = None, streaming: bool = False, **_: Any) -> Any:
    """Serve `zen`, whole, one split, or streamed. Raises: FileNotFoundError for another dataset."""
    if path != f"{OWNER}/zen":
        raise FileNotFoundError(f"{path} is not among the stand-ins")
    found: Any = texts(name)
    if streaming:
        found = datasets.IterableDatasetDict({key: rows.to_iterable_dataset() for key, rows in found.items()})
    return found if split is None else found[split]


datasets.load_dataset = load_dataset
if os.environ["PEER_SUITE_CLASS"] == "mel-lite":
    from mel_lite import MELConfig, MELTrainer

    trl.GRPOTrainer, trl.GRPOConfig = MELTrainer, MELConfig
