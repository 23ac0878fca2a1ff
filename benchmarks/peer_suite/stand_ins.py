"""Random models and a few texts under the names of the Hub's `trl-internal-testing`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

OWNER = "trl-internal-testing"
COMMIT = 40 * "0"
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"qwen2": "qwen2_5.jinja", "qwen3": "qwen3.jinja", "qwen3_moe": "qwen3.jinja"}

LARGE = ("qwen3", "qwen3_moe")
"""Model types with the vocabulary of the Hub's models. It costs time, and most tests work with any."""
SMALL_VOCAB, QWEN_VOCAB = 259, 151936
QWEN_SPECIAL = {END: 151643, START: 151644, STOP: 151645}
QWEN_MARKUP = {
    "<tool_call>": 151657, "</tool_call>": 151658, "<tool_response>": 151665, "</tool_response>": 151666,
    "<think>": 151667, "</think>": 151668,
}  # fmt: skip
QWEN_PIECES = {
    ' "': 330, '",': 497, '":': 788, '{"': 4913, ' {"': 5212, '"}}\n': 95642, "}}\n": 11248, " {": 314, ">\n": 397,
    "</": 522, "tool": 14172, "call": 6659, "name": 606, "arguments": 16370, "async": 7692, "_multiply": 93054,
    "multiply": 64648, "_tool": 22785, "increment": 35744, " increment": 16252, "dec": 450, "rement": 13477,
    "step": 9520, "text": 1318, "sh": 927, "out": 411, "hi": 6023, "Done": 17453, " won": 2765, " don": 1513, "'t": 944,
    " know": 1414, " any": 894, " tool": 5392, " b": 293,
}  # fmt: skip
"""Tokens of Qwen that TRL's tests of tools write as ids. The first 256 ids are bytes, in the same order as here."""

SIZES: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32768,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": 2 * ["full_attention"]}
GLM = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NEMOTRON = {
    "hidden_size": 16, "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 4,
    "mamba_n_groups": 1, "ssm_state_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "use_mamba_kernels": False,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", {"num_labels": 1}),
    "tiny-Qwen3ForCausalLM": ("qwen3", {}),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", {"num_labels": 1}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", EXPERTS),
    "tiny-RemoteForCausalLM": ("qwen2", {}),
    "tiny-LlamaForCausalLM-3.2": ("llama", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", {"num_labels": 1}),
    "tiny-MistralForCausalLM-0.2": ("mistral", {}),
    "tiny-Gemma2ForCausalLM": ("gemma2", {}),
    "tiny-Cohere2ForCausalLM": ("cohere2", {}),
    "tiny-GptOssForCausalLM": ("gpt_oss", GPT_OSS),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", GLM),
    "tiny-NemotronHForCausalLM-nano": ("nemotron_h", NEMOTRON),
}
"""Name on the Hub -> model type and further options of its config. `num_labels` makes a reward model."""
REMOTE_CODE = """from transformers import Qwen2Config, Qwen2ForCausalLM

class RemoteConfig(Qwen2Config):
    model_type = "remote"

class RemoteForCausalLM(Qwen2ForCausalLM):
    config_class = RemoteConfig
"""

PROMPTS = (
    "Beautiful is better", "Explicit is", "Simple is better", "Flat", "Sparse is better", "Readability", "Now", "If the"
)  # fmt: skip


def tokenizer_for(kind: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte; Qwen3's also has QWEN_PIECES, markup, and a word for each other id."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special, markup = {END: 256, START: 257, STOP: 258}, {}
    if kind in LARGE:
        special, markup = QWEN_SPECIAL, QWEN_MARKUP
        vocab |= {text.replace(" ", "Ġ").replace("\n", "Ċ"): i for text, i in QWEN_PIECES.items()}
        vocab |= {f"Ġ{i}": i for i in set(range(QWEN_VOCAB)) - {*(vocab | special | markup).values()}}
    backend = Tokenizer(models.BPE(vocab | special | markup, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    backend.add_tokens(list(markup))
    file = Path(trl.__file__).parent / "chat_templates" / TEMPLATES.get(kind, "")
    template = file.read_text() if file.is_file() else CHAT_TEMPLATE
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=STOP, pad_token=END, chat_template=template, model_max_length=32768
    )


def build(name: str, folder: Path) -> None:
    """Write the random model `name` with its tokenizer."""
    kind, options = MODELS[name]
    tokenizer = tokenizer_for(kind)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    vocab = {"vocab_size": QWEN_VOCAB if kind in LARGE else SMALL_VOCAB}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | ids | vocab | options))
    auto = AutoModelForSequenceClassification if "num_labels" in options else AutoModelForCausalLM
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if name == "tiny-RemoteForCausalLM":
        (folder / "remote.py").write_text(REMOTE_CODE)
        stated = json.loads((folder / "config.json").read_text())
        code = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
        stated |= {"model_type": "remote", "architectures": ["RemoteForCausalLM"], "auto_map": code}
        (folder / "config.json").write_text(json.dumps(stated))


def fill_cache(cache: Path, suite: str) -> None:
    """Write the models that `suite`, a test module's text, names into a Hub cache, where offline loading finds them.

    A model that the installed transformers cannot build is left out: its tests fail with both classes.
    """
    for name in MODELS:
        home = cache / f"models--{OWNER}--{name}"
        if name not in suite or home.is_dir():
            continue
        try:
            build(name, home / "snapshots" / COMMIT)
        except Exception as error:
            print(f"{name} cannot be built here: {type(error).__name__}: {error}")
            continue
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)


def load_dataset(path: str, name: str = "", split: str | None = None, streaming: bool = False, **_: Any) -> Any:
    """Serve a few rows in the form of `zen`: whole, one split, or streamed. Raises: FileNotFoundError for others."""
    if path != f"{OWNER}/zen":
        raise FileNotFoundError(f"{path} has no stand-in here")
    prompts: list[Any] = list(PROMPTS)
    if name.startswith("conversational"):
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = datasets.Dataset.from_dict({"prompt": prompts})
    found: Any = datasets.DatasetDict(train=rows.select(range(6)), test=rows.select(range(6, 8)))
    if streaming:
        found = datasets.IterableDatasetDict({key: rows.to_iterable_dataset() for key, rows in found.items()})
    return found if split is None else found[split]
