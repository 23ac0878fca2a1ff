"""Tiny random models and a byte-level tokenizer, saved to disk like a user's base model."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>")


def tiny_tokenizer(*, eos: str = "<|im_end|>", pad: str | None = "<|endoftext|>") -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte and four special tokens (ids 0 to 3)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=pad, chat_template=CHAT_TEMPLATE, model_max_length=512
    )


def tiny_config(
    kind: str = "llama", *, tied: bool = True, hidden: int = 64, layers: int = 2, head_dim: int = 16
) -> Any:
    """Return the config of a model of about 100k weights. Sizes are multiples of 64, as 4-bit blocks require."""
    options = {
        "vocab_size": 320,
        "hidden_size": hidden,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return (LlamaConfig if kind == "llama" else Qwen3Config)(**options)


def save_tiny(
    folder: Path, kind: str = "llama", *, tied: bool = True, dtype: str = "float32", seed: int = 0, **config: int
) -> Path:
    """Write a random model and tokenizer. Weights are scaled up, since initial distributions are nearly uniform.

    Leaves the random generator as it is after drawing the weights.
    """
    files, generator = _tiny_files(kind, tied=tied, dtype=dtype, seed=seed, **config)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.set_rng_state(generator)
    return folder


@functools.cache
def _tiny_files(
    kind: str, *, tied: bool, dtype: str, seed: int, **config: int
) -> tuple[dict[str, bytes], torch.Tensor]:
    """Files of a model by name, and the state of the random generator after it was made."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, tied=tied, **config), dtype=torch.float32)
    generator = torch.get_rng_state()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
        model.model.norm.weight.mul_(8)
    with tempfile.TemporaryDirectory() as folder:
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}, generator


def set_lora(model: Any, scale: float, *, seed: int = 1) -> None:
    """Set every LoRA-B to random values, so that the adapter changes the model, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
