"""Load the model of a run with Unsloth, and sample from it.

With vLLM, the engine shares the trained weights (`mel_lite.engines.vllm`). Without it, Unsloth's own generation runs
the model and the sampler of the transformers engine draws the tokens. Only this module imports unsloth, unsloth_zoo and
vllm, and only inside functions: importing unsloth patches transformers, PEFT and TRL for the whole process.
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
from mel_lite.models.load import ModelSpec, keep_four_bit_layout, resolve_dtype
from mel_lite.models.origin import locate, model_errors

logger = logging.getLogger(__name__)

STANDBY = "UNSLOTH_VLLM_STANDBY"
"""Environment variable that starts vLLM with sleep mode. Unsloth reads it during its import."""
KEEP_UTILIZATION = "UNSLOTH_VLLM_STANDBY_UTIL_OVERRIDE"
"""Environment variable that makes Unsloth keep `gpu_memory_utilization` in standby instead of choosing its own."""
DEFAULT_UTILIZATION = 0.5
"""Unsloth's default share. With standby, Unsloth then chooses a share for the card itself."""


class UnslothUnusable(EngineError):
    """Unsloth is installed but cannot be imported."""


def load_unsloth(spec: ModelSpec, lora: LoraSpec, *, vllm: bool, max_seq_length: int, seed: int) -> Any:
    """Load the base model with its LoRA adapter once, for training and sampling.

    Loads exactly the named base, never a quantized copy of another repository, and runs no code of its repository.

    Args: `max_seq_length` bounds every sequence of the run: Unsloth truncates longer ones, and vLLM reserves memory for
        this many tokens.
    Raises: UnslothUnusable when unsloth cannot be imported; ModelError like `mel_lite.models.load.load_base`;
        EngineError when vLLM does not start, or not for sequences of this length.
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
            # Unsloth replaces 256, its default, by its own choice.
            options["max_num_seqs"] = 255 if spec.max_num_seqs == 256 else spec.max_num_seqs
    with model_errors(spec.name), _engine_errors(vllm):
        model, _ = fast.from_pretrained(
            model_name=locate(spec.name),
            max_seq_length=max_seq_length,
            dtype=resolve_dtype(spec.dtype),
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,
            use_safetensors=True,
            offload_embedding=False,  # ids are moved to the device of the first weight
            trust_remote_code=False,
            random_state=seed,
            **options,
        )
    if (llm := getattr(model, "vllm_engine", None)) is not None:  # missing if vLLM cannot serve the model
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


def _check_context(granted_tokens: int, needed_tokens: int) -> None:
    """Check that vLLM was started for sequences of this length. Raises: EngineError.

    If Unsloth estimates that vLLM's share is too small, it starts vLLM with a shorter context, which would truncate
    sequences.
    """
    if granted_tokens < needed_tokens:
        room = f"sequences of {granted_tokens} tokens" if granted_tokens > 0 else "the model, but for no sequence"
        raise EngineError(
            f"vLLM has memory for {room}, but this run needs {needed_tokens} tokens. Raise "
            "model.gpu_memory_utilization; set or lower model.max_seq_length, train.max_context_tokens, "
            "train.max_completion_length or data.max_prompt_tokens; or use --engine hf."
        )


def _share_of_free(share: float | None) -> float | None:
    """Convert a share of the card into a share of its free memory, by which Unsloth multiplies."""
    if share is None or not torch.cuda.is_available():
        return share
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return min(0.99, share * total_bytes / free_bytes)


def _import_unsloth(vllm: bool) -> Any:
    """Import `FastLanguageModel`. Raises: UnslothUnusable."""
    if vllm and "unsloth" not in sys.modules:
        os.environ.setdefault(STANDBY, "1")
    elif vllm and os.environ.get(STANDBY, "0") != "1":
        logger.warning(
            "unsloth was imported without %s=1, so vLLM keeps its memory while the model trains. Set the variable "
            "before the import, or import mel_lite first.",
            STANDBY,
        )
    try:
        with warnings.catch_warnings():
            # MELTrainer needs TRL's released class, so TRL may well be imported before Unsloth replaces that class.
            warnings.filterwarnings("ignore", message="(?s).*Unsloth should be imported before")
            from unsloth import FastLanguageModel
    except Exception as error:  # its patches may raise anything
        raise UnslothUnusable(
            f"unsloth cannot be imported ({type(error).__name__}: {error}). Run `mel-lite doctor`, install the "
            "versions it names, or use --engine hf."
        ) from error
    return FastLanguageModel


@contextmanager
def _engine_errors(vllm: bool) -> Iterator[None]:
    """Convert errors of vLLM's start to an EngineError with a fix."""
    try:
        yield
    except (RuntimeError, NotImplementedError, AssertionError, MemoryError) as error:  # OutOfMemoryError is the first
        fix = "Use --engine hf."
        if vllm:
            # Either the share leaves no memory for the cache, or the card has less free memory than the share.
            too_small = any(text in str(error) for text in ("No available memory", "available KV cache"))
            fix = (
                f"{'Raise' if too_small else 'Lower'} model.gpu_memory_utilization, lower model.max_seq_length, or "
                "sample without vLLM: --set model.fast_inference=false."
            )
        raise EngineError(f"Unsloth could not load the model ({type(error).__name__}: {error}). {fix}") from error


def is_unsloth(model: Any) -> bool:
    """Return True when Unsloth loaded the model."""
    return hasattr(model, "for_inference") and hasattr(model, "for_training")


def unsloth_engine(model: Any, *, step: Callable[[], int], eos_ids: Sequence[int], **options: Any) -> Engine:
    """Build the engine for a model that Unsloth loaded; `options` are those of the transformers engine.

    Raises: ModelError for a model without LoRA under vLLM, since vLLM shares the base weights.
    """
    llm = getattr(model, "vllm_engine", None)
    if llm is None:
        # One GPU needs no unwrapping, and Unsloth's patched version of TRL's would also switch modes.
        # Its inference mode builds its own caches.
        return UnslothEngine(model, eos_ids=eos_ids, **(options | {"unwrap": None, "shares_prefill": False}))
    if not hasattr(model, "peft_config"):
        raise ModelError(
            "The model has no LoRA adapter, but vLLM shares its base weights. Add an adapter with "
            "FastLanguageModel.get_peft_model, or load it with fast_inference=False."
        )
    from vllm import SamplingParams
    from vllm.v1.engine import FinishReason

    config = llm.llm_engine.vllm_config
    return VLLMEngine(
        llm,
        sampling_params=SamplingParams,
        load_adapter=_AdapterLoader(model),
        fingerprint=lambda: adapter_fingerprint(model),
        step=step,
        eos_ids=eos_ids,
        standby=bool(getattr(config.model_config, "enable_sleep_mode", False)),
        context_tokens=config.model_config.max_model_len,
        share=config.cache_config.gpu_memory_utilization,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        aborted=FinishReason.ABORT,
    )


class _AdapterLoader:
    """Passes the current LoRA matrices to vLLM in memory. Only their config goes through a temporary folder."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._folder = tempfile.TemporaryDirectory(prefix="mel-lite-adapter-")

    def __call__(self) -> Any:
        from unsloth_zoo.vllm_utils import load_lora

        return load_lora(self._model, self._folder.name, load_tensors=True)


def adapter_fingerprint(model: Any) -> tuple[float, ...]:
    """Return the sum and Euclidean norm of every LoRA matrix, in float64. They are equal while no matrix changes."""
    matrices = [p.detach() for name, p in model.named_parameters() if ".lora_" in name]
    sums = [m.sum(dtype=torch.float64) for m in matrices]
    norms = [torch.linalg.vector_norm(m, dtype=torch.float64) for m in matrices]
    return tuple(torch.stack(sums + norms).tolist())


class UnslothEngine(HFEngine):
    """Transformers engine for a model that Unsloth loaded. It samples in Unsloth's inference mode."""

    name = "unsloth"

    @contextmanager
    def _sampling_mode(self, model: Any) -> Iterator[None]:
        """Use Unsloth's inference mode inside the block, then restore training mode and gradient checkpointing."""
        training = model.training
        modes = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
        checkpointing = next(filter(None, modes), False)
        model.for_inference()
        try:
            yield
        finally:
            model.for_training(use_gradient_checkpointing=checkpointing)
            model.train(training)
