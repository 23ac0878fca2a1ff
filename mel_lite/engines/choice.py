"""Choose the engine of a run before anything is loaded, with a reason to print."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mel_lite.errors import ConfigError
from mel_lite.imports import install_command
from mel_lite.models.adapters import LoraSpec, adapter_rank
from mel_lite.models.load import ModelSpec

if TYPE_CHECKING:
    from mel_lite.recipe import Recipe

VLLM_CAPABILITY = (7, 5)
VLLM_TEMPERATURE = 2.0
"""Highest temperature vLLM accepts."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""LoRA ranks for which vLLM allocates slots."""
VLLM_BATCHED_TOKENS = 4096
"""Most tokens of one vLLM forward pass (`max_num_batched_tokens`); longer prompts are prefilled in chunks of this."""
BNB_PLUGIN = "vllm-bnb-plugin"
"""Package that vLLM (0.28 or newer) needs to load 4-bit weights."""

_TITLES = {"hf": "transformers", "unsloth": "Unsloth", "vllm-server": "a vLLM server"}
_AVAILABLE = "CUDA and unsloth are available"


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Engine of a run, with the reason for it."""

    engine: str
    """`unsloth`, `hf` or `vllm-server`."""
    vllm: bool
    """With `unsloth`: True to sample with vLLM on the trained weights, False for Unsloth's own generation."""
    reason: str

    @property
    def title(self) -> str:
        """Display name of the library that samples."""
        return "Unsloth and vLLM" if self.vllm else _TITLES[self.engine]

    @property
    def line(self) -> str:
        """One line for the terminal."""
        with_vllm = " with vLLM on the trained weights" if self.vllm else ""
        return f"engine: {self.engine}{with_vllm} ({self.reason})"


@dataclass(frozen=True, slots=True)
class Machine:
    """Properties of a machine that the choice depends on."""

    capability: tuple[int, int] | None
    """Compute capability of the first CUDA device; None without one."""
    packages: frozenset[str]
    """Installed packages out of unsloth, vllm and vllm-bnb-plugin."""
    processes: int = 1


def this_machine(processes: int = 1) -> Machine:
    """Describe this machine without importing any of the packages."""
    import torch

    found = {name for name in ("unsloth", "vllm") if find_spec(name) is not None}
    try:
        version(BNB_PLUGIN)
        found.add(BNB_PLUGIN)
    except PackageNotFoundError:
        pass
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return Machine(capability, frozenset(found), processes)


def choose_engine(spec: ModelSpec, lora: LoraSpec | None, machine: Machine) -> EngineChoice:
    """Resolve `model.engine` for a machine.

    `auto` selects Unsloth if there is a CUDA device, the package is installed, and Unsloth honors every option that is
    set; otherwise transformers. `unsloth` requires Unsloth, with its CPU backend on a machine without CUDA.

    Raises: ConfigError when `unsloth` is requested but cannot be used, with the fix.
    """
    if spec.engine in ("hf", "vllm-server"):
        return EngineChoice(spec.engine, False, f"model.engine={spec.engine}")
    obstacle = _obstacle(spec, lora, machine)
    if spec.engine == "unsloth":
        if obstacle is not None:
            raise ConfigError(f"engine='unsloth': {obstacle}. Fix that, or use --engine hf.")
        assert lora is not None
        vllm, reason = _fast_inference(spec, lora, machine)
        return EngineChoice("unsloth", vllm, f"model.engine=unsloth; {reason}")
    if machine.capability is None:
        return EngineChoice("hf", False, "no CUDA device")
    if obstacle is not None:
        return EngineChoice("hf", False, obstacle)
    assert lora is not None  # else there was an obstacle
    vllm, reason = _fast_inference(spec, lora, machine)
    return EngineChoice("unsloth", vllm, f"{_AVAILABLE}; {reason}")


def planned_engine(spec: ModelSpec, lora: LoraSpec | None, machine: Machine | None) -> EngineChoice:
    """Return `choose_engine`'s result. None = another machine, with a GPU and the extra `gpu` installed."""
    if machine is not None:
        return choose_engine(spec, lora, machine)
    choice = choose_engine(spec, lora, Machine((8, 0), frozenset({"unsloth", "vllm", BNB_PLUGIN})))
    return replace(choice, reason=choice.reason.replace(_AVAILABLE, "as installed with the extra `gpu`"))


def check_engine(choice: EngineChoice, recipe: Recipe) -> None:
    """Check the options of a run against its engine. Raises: ConfigError for one it cannot honor, with the fix."""
    spec, given = recipe.model, {name: _number(value) for name, value in recipe.train.items()}
    _check_server(choice, recipe)
    if choice.vllm and given.get("beta"):
        raise ConfigError(
            f"beta={given['beta']:g} with vLLM on the trained weights: TRL keeps a second adapter as the reference, "
            "and vLLM would receive both. Set train.beta=0 (the default), model.fast_inference=false, or --engine hf."
        )
    temperatures = {f"train.{name}": given.get(name) for name in ("temperature", "analysis_temperature")}
    for key, value in {**temperatures, "eval.temperature": recipe.eval.temperature}.items():
        if choice.vllm and (value or 0) > VLLM_TEMPERATURE:
            raise ConfigError(
                f"{key}={value:g}: vLLM samples at {VLLM_TEMPERATURE:g} at most. Lower {key}, or use --engine hf."
            )
    if choice.engine == "unsloth" and spec.use_gradient_checkpointing == "unsloth" and given.get("grad_norm_every"):
        raise ConfigError(
            f"use_gradient_checkpointing='unsloth' and grad_norm_every={given['grad_norm_every']:g}: Unsloth's "
            "checkpointing is reentrant and cannot take the gradient of one loss term. Set train.grad_norm_every=0, or "
            "leave model.use_gradient_checkpointing unset."
        )
    rank = adapter_rank(recipe.lora) if recipe.lora else 0
    if choice.engine == "unsloth" and spec.max_lora_rank is not None and spec.max_lora_rank < rank:
        raise ConfigError(
            f"max_lora_rank={spec.max_lora_rank} is below the adapter's rank of {rank}. Raise model.max_lora_rank, or "
            "leave it unset."
        )


def _check_server(choice: EngineChoice, recipe: Recipe) -> None:
    url = recipe.train.get("engine_url")
    if choice.engine == "vllm-server" and not url:
        raise ConfigError("engine='vllm-server' without engine_url: give the server's address with --engine-url.")
    if choice.engine == "vllm-server" and recipe.lora is None:
        raise ConfigError("engine='vllm-server' with lora=null: only a LoRA adapter can be sent to a server.")
    if url and choice.engine != "vllm-server":
        raise ConfigError(
            f"engine_url={url!r} with engine={choice.engine!r}, which samples in this process. Set "
            "--engine vllm-server, or unset train.engine_url."
        )


def check_length(choice: EngineChoice, spec: ModelSpec, longest_tokens: int) -> None:
    """Check the longest sequence of a run. Raises: ConfigError if Unsloth would truncate it."""
    if choice.engine == "unsloth" and spec.max_seq_length is not None and spec.max_seq_length < longest_tokens:
        raise ConfigError(
            f"max_seq_length={spec.max_seq_length} is below the {longest_tokens} tokens of the run's longest sequence. "
            "Raise model.max_seq_length or leave it unset; or lower train.max_context_tokens, "
            "train.max_completion_length, train.analysis_max_tokens or data.max_prompt_tokens."
        )


def _number(value: Any) -> float | None:
    """Return an option of `train` as a number, or None. The check of the options rejects other values."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _obstacle(spec: ModelSpec, lora: LoraSpec | None, machine: Machine) -> str | None:
    """Return the reason why Unsloth cannot load this model with these options. None when it can."""
    ignored: dict[str, Any] = {}
    if spec.load_in_4bit and spec.quant_type != "nf4":
        ignored["quant_type"] = spec.quant_type
    if spec.load_in_4bit and not spec.double_quant:
        ignored["double_quant"] = spec.double_quant
    if spec.attn_implementation is not None:
        ignored["attn_implementation"] = spec.attn_implementation
    if "unsloth" not in machine.packages:
        return f"the package unsloth is not installed. Install it with `{install_command('gpu')}`"
    if machine.processes > 1:
        return f"Unsloth serves one GPU, but {machine.processes} processes train together"
    if lora is None:
        return "lora=null: full fine-tuning needs the transformers engine"
    if ignored:
        (name, value), *_ = ignored.items()
        return f"Unsloth ignores model.{name}={value!r}"
    return None


def _fast_inference(spec: ModelSpec, lora: LoraSpec, machine: Machine) -> tuple[bool, str]:
    """Decide if vLLM samples. Returns: the decision and its reason."""
    if not spec.fast_inference:
        return False, "model.fast_inference=false: Unsloth's own generation"
    if machine.capability is None:
        return False, "no CUDA device: Unsloth's CPU backend and its own generation"
    if "vllm" not in machine.packages:
        return False, "vllm is not installed: Unsloth's own generation"
    if machine.capability < VLLM_CAPABILITY:
        return False, f"compute capability {machine.capability} is too old for vLLM: Unsloth's own generation"
    if spec.load_in_4bit and BNB_PLUGIN not in machine.packages:
        return False, f"vLLM needs `pip install {BNB_PLUGIN}` for 4-bit weights: Unsloth's own generation"
    if spec.dtype == "float32":
        return False, "model.dtype=float32, but vLLM shares 16-bit weights: Unsloth's own generation"
    if (rank := spec.max_lora_rank or adapter_rank(lora)) > VLLM_RANKS[-1]:
        return False, f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}, not {rank}: Unsloth's own generation"
    if spec.revision is not None:
        return False, f"model.revision={spec.revision!r}, which vLLM under Unsloth ignores: Unsloth's own generation"
    return True, "vllm is installed"
