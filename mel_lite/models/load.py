"""Load base models and tokenizers.

Weights are loaded from safetensors only, and no code of a model's repository is ever run.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mel_lite.errors import ConfigError, ModelError, check_choice
from mel_lite.models.attention import attention_for
from mel_lite.models.generation import make_generation_config_valid
from mel_lite.models.origin import NO_TOKENIZER, locate, model_errors
from mel_lite.models.progress_bars import are_readable, progress_bars

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
QuantType = Literal["nf4", "fp4"]
EngineName = Literal["auto", "unsloth", "hf", "vllm-server"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Base model and how to load it. `trust_remote_code` is not an option: repository code is never run.

    Raises: ConfigError for a value outside its range.
    """

    name: str
    """Hub id, local folder, or `demo`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; None = its main branch."""
    dtype: str = "auto"
    """`auto`: bfloat16 if the GPU computes in it, float16 on older GPUs (T4), float32 on CPU. With `load_in_4bit` it is
    the dtype of the unquantized layers and of the arithmetic."""
    load_in_4bit: bool = False
    """Quantize the linear layers (not the head) to 4 bits while loading: QLoRA."""
    quant_type: QuantType = "nf4"
    """4-bit data type of bitsandbytes."""
    double_quant: bool = True
    """Also quantize the scales, which saves 0.4 bits per weight."""
    attn_implementation: str | None = None
    """`sdpa`, `eager`, `flash_attention_2`, ...; None = transformers' choice. Kernels on the Hub are rejected, since
    they are code."""
    freeze_head: bool = False
    """With `lora: null`: do not train the head, nor the input embeddings if it shares their weights. `distill` needs it
    unless its form is `sampled`."""
    engine: EngineName = "auto"
    """Library that loads the model of a run and samples from it: Unsloth, or transformers (`hf`). `auto`: Unsloth if
    there is a CUDA device and the package is installed. `vllm-server`: transformers loads and trains it, and the vLLM
    server at `train.engine_url` samples."""
    fast_inference: bool = True
    """With Unsloth: sample with vLLM on the trained weights, if it is installed."""
    gpu_memory_utilization: float | None = None
    """Share of the GPU's memory for vLLM while it samples; None = as planned with `--gpu`, else Unsloth's choice."""
    max_num_seqs: int | None = None
    """Most sequences vLLM samples at once; None = as planned with `--gpu`, else Unsloth's choice."""
    max_lora_rank: int | None = None
    """Largest LoRA rank vLLM reserves memory for; None = rank of the adapter."""
    max_seq_length: int | None = None
    """Longest sequence Unsloth and vLLM reserve memory for, in tokens; None = longest sequence of the run."""
    use_gradient_checkpointing: bool | Literal["unsloth"] | None = None
    """With Unsloth: `unsloth` moves checkpointed activations to the CPU; None = `train.gradient_checkpointing`."""

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, get_args(EngineName), fix="Set model.engine.")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization < 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must lie between 0 and 1: it is a share of the "
                "GPU's memory. Set model.gpu_memory_utilization."
            )
        for name in ("max_num_seqs", "max_lora_rank", "max_seq_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1, or null. Set model.{name}.")
        if not self.name:
            raise ConfigError("model name is empty. Give a Hub id (Qwen/Qwen3-4B-Base), a local folder, or `demo`.")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("quant_type", self.quant_type, get_args(QuantType))
        if "/" in (self.attn_implementation or ""):
            raise ConfigError(
                f"attn_implementation={self.attn_implementation!r} names a kernel on the Hub, which is repository code "
                "and is never run. Set sdpa, eager, or an installed one such as flash_attention_2."
            )


def resolve_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for a spec's `dtype` on this machine."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_tokenizer(spec: ModelSpec, *, saved_in: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer with left padding, and a pad token other than the eos token if the vocabulary has one.

    A tokenizer saved in the folder `saved_in` (a checkpoint or adapter) replaces the base model's, and a chat template
    saved there is used even without a tokenizer, so that prompts stay those of the training. The vocabulary is never
    extended. Logs a warning when there is no chat template, and when the template ends an assistant turn with another
    token than eos, since generation would continue.

    Raises: ModelError when it cannot be loaded or has no eos token.
    """
    path, tokenizer = _tokenizer_files(spec, saved_in)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"tokenizer of {spec.name!r} has no eos token, so a completion could never end. Set `eos_token` in its "
            "tokenizer_config.json."
        )
    tokenizer.padding_side = "left"
    _choose_pad_token(tokenizer)
    if tokenizer.chat_template is None:
        logger.warning("%s has no chat template: conversations are written as plain text.", spec.name)
        return tokenizer
    with model_errors(path):
        end = turn_end_id(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        logger.warning(
            "%s: the chat template ends a turn with %s but eos is %s; make sure that generation stops at both.",
            spec.name,
            tokenizer.convert_ids_to_tokens(end),
            tokenizer.eos_token,
        )
    return tokenizer


def _tokenizer_files(spec: ModelSpec, saved_in: Path | None) -> tuple[str, PreTrainedTokenizerBase]:
    """Return where the tokenizer was found, and the tokenizer with the chat template of `saved_in`, else the base's."""
    from transformers import AutoTokenizer

    def load(path: str, revision: str | None) -> PreTrainedTokenizerBase:
        with model_errors(path):
            found = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        if len(found.get_vocab()) <= len(found.added_tokens_decoder):  # transformers makes an empty one of some types
            raise ModelError(f"model={path!r}: {NO_TOKENIZER}")
        return found

    if saved_in is not None and (saved_in / "tokenizer_config.json").is_file():
        saved = load(str(saved_in), None)
        if saved.chat_template is None:
            saved.chat_template = load(locate(spec.name), spec.revision).chat_template
        return str(saved_in), saved
    path = locate(spec.name)
    tokenizer = load(path, spec.revision)
    if saved_in is not None and (file := saved_in / "chat_template.jinja").is_file():
        with model_errors(str(file)):
            tokenizer.chat_template = file.read_text(encoding="utf-8")
    return path, tokenizer


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    candidates = [token for token in special if "pad" in token.lower()] + ["<|endoftext|>", tokenizer.unk_token]
    known = tokenizer.get_vocab()
    tokenizer.pad_token = next(
        (token for token in candidates if token in known and token != tokenizer.eos_token), tokenizer.eos_token
    )
    logger.info("pad token set to %s", tokenizer.pad_token)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the special token that ends an assistant turn in the chat template. None when there is none.

    Also None for a template that rejects the turn; `render` names conversations that it rejects.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    marker = "last-words"
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": marker}]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except TemplateError as error:
        if type(error) is not TemplateError:  # the template is broken; its own `raise_exception` raises this class
            raise
        return None
    after = tokenizer(text.rsplit(marker, 1)[-1], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in after if token in special), None)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return every id that ends a completion: the tokenizer's eos, and those of the model's generation config.

    TRL uses the same rule, so evaluation stops where training does.
    """
    named = model.generation_config.eos_token_id if model.generation_config else None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *ids]))


def load_config(spec: ModelSpec) -> Any:
    """Load the model's configuration without its weights. Raises: ModelError, like `load_base`."""
    from transformers import AutoConfig

    path = locate(spec.name)
    with model_errors(spec.name):
        config = AutoConfig.from_pretrained(path, revision=spec.revision, trust_remote_code=False)
        _refuse_hub_kernels(path, spec)
        return config


def _refuse_hub_kernels(path: str, spec: ModelSpec) -> None:
    """Check that the config names no kernel on the Hub (attention, experts): transformers would download and run it.

    Raises: ModelError.
    """
    from transformers import PreTrainedConfig

    loaded, _ = PreTrainedConfig.get_config_dict(path, revision=spec.revision)
    for key, value in _items(loaded):
        if "implementation" in key and "/" in str(value):
            raise ModelError(
                f"model={spec.name!r}: its config.json sets {key}={value!r}, a kernel on the Hub, which is repository "
                "code and is never run. Remove the key from the file."
            )


def _items(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key of nested dicts with its value."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield str(key), value
        yield from _items(value)


def load_base(spec: ModelSpec) -> PreTrainedModel:
    """Load the base model in evaluation mode, on the GPU if there is one. 4-bit loading also works on a CPU.

    Raises: ModelError when it cannot be found, downloaded or loaded, with the fix.
    """
    from transformers import AutoModelForCausalLM

    dtype = resolve_dtype(spec.dtype)
    options: dict[str, Any] = {"dtype": dtype, "revision": spec.revision, "device_map": _device_map(spec)}
    if attention := attention_for(spec.attn_implementation):
        options["attn_implementation"] = attention
    if spec.load_in_4bit:
        options["quantization_config"] = _four_bit(spec, dtype)
    path = locate(spec.name)
    with model_errors(spec.name), progress_bars(shown=are_readable()):
        _refuse_hub_kernels(path, spec)
        load = functools.partial(
            AutoModelForCausalLM.from_pretrained, path, trust_remote_code=False, use_safetensors=True, **options
        )
        try:
            model = load()
        except ValueError:
            if attention in (None, spec.attn_implementation):
                raise
            model = load(attn_implementation=None)  # one of the few architectures without SDPA
    keep_four_bit_layout(model)
    make_generation_config_valid(model)
    return model


def _device_map(spec: ModelSpec) -> dict[str, str] | None:
    import torch

    if torch.cuda.is_available():
        return {"": f"cuda:{os.environ.get('LOCAL_RANK', '0')}"}
    return {"": "cpu"} if spec.load_in_4bit else None


def _four_bit(spec: ModelSpec, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quant_type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_four_bit_layout(model: PreTrainedModel) -> None:
    """Switch off bitsandbytes' CPU inference layout, if it has one. `load_base` already does this.

    On CPUs with AVX512-BF16, the first forward pass in evaluation mode repacks a 4-bit weight for a kernel that has no
    backward: training would silently lose the gradient of every layer below, and sampling would round differently.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def context_length(model_or_config: Any) -> int:
    """Return the most tokens (prompt + completion) that the model has positions for.

    Raises: ModelError when the config does not state it.
    """
    config = getattr(model_or_config, "config", model_or_config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        if isinstance(value := getattr(text, name, None), int) and value > 0:
            return value
    raise ModelError(f"config of {config.model_type!r} does not state its context length. Set max_position_embeddings.")


def check_weights(spec: ModelSpec) -> None:
    """Check that the base has weights to load, without loading them: in its folder, or offline in the Hub cache.

    Raises: ModelError, also for a base that cannot be found.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from safetensors import safe_open

    path = locate(spec.name)
    names = ("model.safetensors", "model.safetensors.index.json")
    if Path(path).is_dir():
        shards = sorted(Path(path).glob("*.safetensors"))
        found = bool(shards)
        with model_errors(spec.name):
            for shard in shards:
                with safe_open(shard, "pt"):  # reads the header, which a file that was cut off contradicts
                    pass
    elif constants.HF_HUB_OFFLINE:
        with model_errors(spec.name):
            load_config(spec)
            found = any(isinstance(try_to_load_from_cache(path, n, revision=spec.revision), str) for n in names)
    else:
        return
    if not found:
        raise ModelError(
            f"model={spec.name!r}: it has no safetensors weights {'here' if Path(path).is_dir() else 'in the cache'}, "
            "and pickled ones are never loaded. Download or convert it (`save_pretrained`)."
        )
