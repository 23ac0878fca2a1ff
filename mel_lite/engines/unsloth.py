"""Unsloth: loads the one model that acts, checks itself and learns, and samples from it.

With vLLM the engine shares the trained weights (`mel_lite.engines.vllm`); without it, Unsloth's own generation draws
the tokens as the transformers engine does. This is the only room that imports unsloth, unsloth_zoo and vllm, inside
functions: importing unsloth patches transformers, PEFT and TRL for the whole process.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from mel_lite.engines.base import Engine
from mel_lite.engines.choice import VLLM_BATCHED_TOKENS
from mel_lite.engines.hf import HFEngine
from mel_lite.engines.vllm import VLLMEngine
from mel_lite.errors import EngineError, ModelError
from mel_lite.models.adapters import LoraSpec, adapter_rank, attach_adapter, find_adapter, lora_config
from mel_lite.models.load import ModelSpec, keep_four_bit_layout, locate, model_errors, resolve_dtype

logger = logging.getLogger(__name__)

STANDBY = "UNSLOTH_VLLM_STANDBY"
"""Environment variable that starts vLLM with sleep mode. Unsloth reads it while it is being imported."""
KEEP_UTILIZATION = "UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE"
"""Environment variable without which Unsloth replaces `gpu_memory_utilization` by a share of its own in standby."""
DEFAULT_UTILIZATION = 0.5
"""Of Unsloth; with standby it then picks a share for the card itself."""


class UnslothUnusable(EngineError):
    """Unsloth is installed but does not import here."""


def load_unsloth(spec: ModelSpec, lora: LoraSpec, *, vllm: bool, max_seq_length: int, seed: int) -> Any:
    """The base model with its LoRA adapter, loaded by Unsloth once for training and sampling.

    `max_seq_length` bounds every sequence of the run: Unsloth cuts longer ones, and vLLM makes room for that many.
    The base is the one that is named, never a quantised copy from elsewhere, and no code of its repository is run.

    Raises: UnslothUnusable when unsloth does not import; ModelError as `mel_lite.models.load.load_base`; EngineError
        when vLLM does not start, or not for sequences of this length.
    """
    fast = _import_unsloth(vllm)
    if spec.gpu_memory_utilization is not None:
        os.environ[KEEP_UTILIZATION] = "1"
    checkpointing = spec.use_gradient_checkpointing or False
    options: dict[str, Any] = {"load_in_4bit": spec.load_in_4bit, "revision": spec.revision}
    if vllm:
        options |= {
            "fast_inference": True,
            "max_lora_rank": spec.max_lora_rank or adapter_rank(lora),
            "gpu_memory_utilization": _share_of_free(spec.gpu_memory_utilization) or DEFAULT_UTILIZATION,
            "max_num_batched_tokens": max(VLLM_BATCHED_TOKENS, spec.max_num_seqs or 0),
        }
        if spec.max_num_seqs is not None:
            # To Unsloth 256 is the default, which it replaces by a number of its own.
            options["max_num_seqs"] = 255 if spec.max_num_seqs == 256 else spec.max_num_seqs
    with model_errors(spec.name), _engine_errors(vllm):
        model, _ = fast.from_pretrained(
            model_name=locate(spec.name),
            max_seq_length=max_seq_length,
            dtype=resolve_dtype(spec.dtype),
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,
            use_safetensors=True,
            offload_embedding=False,  # ids go to the device of the first weight
            trust_remote_code=False,
            random_state=seed,
            **options,
        )
    if (llm := getattr(model, "vllm_engine", None)) is not None:  # Unsloth goes without where vLLM cannot serve a model
        _check_context(llm.llm_engine.vllm_config.model_config.max_model_len, max_seq_length)
    keep_four_bit_layout(model)
    if lora.start_from is not None:
        return attach_adapter(model, find_adapter(lora.start_from), trainable=True)
    config = lora_config(lora)  # checks the options
    return fast.get_peft_model(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        use_rslora=config.use_rslora,
        init_lora_weights=config.init_lora_weights,
        use_gradient_checkpointing=checkpointing,
        random_state=seed,
    )


def _check_context(granted_tokens: int, asked_tokens: int) -> None:
    """Unsloth starts vLLM for shorter sequences where it takes its share to be too small, and they would be cut."""
    if granted_tokens < asked_tokens:
        raise EngineError(
            f"vLLM has room for sequences of {granted_tokens} tokens, and this run asks for {asked_tokens}. Raise "
            "model.gpu_memory_utilization; set or lower model.max_seq_length, train.max_context_tokens, "
            "train.max_completion_length or data.max_prompt_tokens; or take --engine hf."
        )


def _share_of_free(share: float | None) -> float | None:
    """The share of what is free now that is this share of the whole card: Unsloth multiplies by what is free."""
    if share is None or not torch.cuda.is_available():
        return share
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return min(0.99, share * total_bytes / free_bytes)


def _import_unsloth(vllm: bool) -> Any:
    """`FastLanguageModel`. Raises: UnslothUnusable."""
    if vllm and "unsloth" not in sys.modules:
        os.environ.setdefault(STANDBY, "1")
    elif vllm and os.environ.get(STANDBY, "0") != "1":
        logger.warning(
            "unsloth was imported without %s=1, so vLLM keeps its memory while the model trains. Set it before the "
            "import, or import mel_lite first.",
            STANDBY,
        )
    try:
        with warnings.catch_warnings():
            # MELTrainer stands on TRL's class as released, which must be there before Unsloth replaces it, or found.
            warnings.filterwarnings("ignore", message="(?s).*Unsloth should be imported before")
            from unsloth import FastLanguageModel
    except Exception as error:  # whatever it finds missing while it patches
        raise UnslothUnusable(
            f"unsloth does not import ({type(error).__name__}: {error}). Run `mel-lite doctor`, install the versions "
            "it names, or take --engine hf."
        ) from error
    return FastLanguageModel


@contextmanager
def _engine_errors(vllm: bool) -> Iterator[None]:
    """What vLLM raises while starting, as an EngineError with what may help."""
    try:
        yield
    except (RuntimeError, NotImplementedError, AssertionError, MemoryError) as error:  # OutOfMemoryError is the first
        fix = "Take --engine hf."
        if vllm:
            # Its share leaves nothing for the cache, or it does not find its share on the card.
            raises = any(text in str(error) for text in ("No available memory", "available KV cache"))
            fix = (
                f"{'Raise' if raises else 'Lower'} model.gpu_memory_utilization, lower model.max_seq_length, or go "
                "without vLLM: --set model.fast_inference=false."
            )
        raise EngineError(f"Unsloth could not load the model ({type(error).__name__}: {error}). {fix}") from error


def is_unsloth(model: Any) -> bool:
    """Whether Unsloth loaded the model."""
    return hasattr(model, "for_inference") and hasattr(model, "for_training")


def unsloth_engine(model: Any, *, step: Callable[[], int], eos_ids: Sequence[int], **options: Any) -> Engine:
    """The engine over a model that Unsloth loaded; `options` are those of the transformers engine.

    Raises: ModelError for a model without LoRA under vLLM, whose base nobody may change.
    """
    llm = getattr(model, "vllm_engine", None)
    if llm is None:
        # One GPU needs no unwrapping, and Unsloth's patch of TRL's would switch modes beside ours.
        # Its inference mode builds caches of its own.
        return UnslothEngine(model, eos_ids=eos_ids, **(options | {"unwrap": None, "shares_prefill": False}))
    if not hasattr(model, "peft_config"):
        raise ModelError(
            "The model has no LoRA adapter, but vLLM shares its weights. Add one with "
            "FastLanguageModel.get_peft_model, or load it with fast_inference=False."
        )
    from vllm import SamplingParams

    config = llm.llm_engine.vllm_config
    return VLLMEngine(
        llm,
        sampling_params=SamplingParams,
        load_adapter=_Handover(model),
        fingerprint=lambda: adapter_fingerprint(model),
        step=step,
        eos_ids=eos_ids,
        standby=bool(getattr(config.model_config, "enable_sleep_mode", False)),
        context_tokens=config.model_config.max_model_len,
        share=config.cache_config.gpu_memory_utilization,
        max_num_seqs=config.scheduler_config.max_num_seqs,
    )


class _Handover:
    """Gives vLLM the live LoRA matrices; only their config goes through a folder, made and removed here."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._folder = tempfile.TemporaryDirectory(prefix="mel-lite-adapter-")

    def __call__(self) -> Any:
        from unsloth_zoo.vllm_utils import load_lora

        return load_lora(self._model, self._folder.name, load_tensors=True)


def adapter_fingerprint(model: Any) -> tuple[float, ...]:
    """Sum and Euclidean norm of every LoRA matrix, taken in float64: equal exactly while none of them changes."""
    matrices = [p.detach() for name, p in model.named_parameters() if ".lora_" in name]
    sums = [m.sum(dtype=torch.float64) for m in matrices]
    norms = [torch.linalg.vector_norm(m, dtype=torch.float64) for m in matrices]
    return tuple(torch.stack(sums + norms).tolist())


class UnslothEngine(HFEngine):
    """The transformers engine on a model that Unsloth loaded, switched to Unsloth's inference mode while it samples."""

    name = "unsloth"

    @contextmanager
    def _sampling_mode(self, model: Any) -> Iterator[None]:
        """Unsloth's inference mode; training mode and gradient checkpointing come back as they were."""
        training = model.training
        modes = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
        checkpointing = next(filter(None, modes), False)
        model.for_inference()
        try:
            yield
        finally:
            model.for_training(use_gradient_checkpointing=checkpointing)
            model.train(training)
