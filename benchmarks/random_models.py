"""Models with the sizes of real ones and random weights, for machines without downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


def random_weights(folder: Path, config: Any) -> None:
    """Write a checkpoint of random 16-bit weights, one file per layer, and a tokenizer that fits any vocabulary."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: dict[str, dict[str, Any]] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(layer, {})[name] = weight.shape
    index: dict[str, str] = {}
    for layer, shapes in files.items():
        file = f"model-{layer}.safetensors"
        tensors = {}
        for name, shape in shapes.items():
            norm = len(shape) == 1
            made = torch.ones(shape, device=device) if norm else torch.randn(shape, device=device) * 0.02
            tensors[name] = made.to(torch.bfloat16).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures, config.dtype = ["Qwen3ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if device == "cuda":
        torch.cuda.empty_cache()


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ("<|endoftext|>", "<|im_end|>", "<|pad|>")
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[1], pad_token=special[2])


def config_of(gpu: str, dry_run: bool) -> tuple[str, Any]:
    """Return name and config of the preset's model, from the planner's table of sizes."""
    from transformers import Qwen3Config

    from mel_lite.memory.formulas import known_shape
    from mel_lite.recipe import resolve

    name = resolve(preset=gpu).model.name
    shape = known_shape(name)
    assert shape is not None, name
    sizes = {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
    }  # fmt: skip
    config = Qwen3Config(
        **(TINY if dry_run else sizes), tie_word_embeddings=shape.tied, max_position_embeddings=shape.context,
        bos_token_id=None, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return name, config
