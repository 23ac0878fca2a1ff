"""LoRA adapters: their configuration, and the base they belong to.

An adapter means nothing without the exact base it was trained on. `mel_lite.json`, beside PEFT's own files, says which
one that was; it is checked whenever the adapter is attached.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mel_lite.errors import ConfigError, ModelError, check_choice
from mel_lite.models.demo import DEMO_ADAPTER, demo_path
from mel_lite.models.load import DEMO, ModelSpec

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

RECORD = "mel_lite.json"
WEIGHTS = "adapter_model.safetensors"
LORA_INITS: dict[str, Any] = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}
_HEAD_NAMES = ("lm_head", "embed_out", "output_layer")
_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
_SAMPLES_PER_WEIGHT = 1024
_RECORDED = ("name", "revision", "dtype", "load_in_4bit", "quant_type", "double_quant", "attn_implementation")
"""Of a ModelSpec, what makes its weights what they are; how a run sampled from them does not."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """The LoRA adapter to train."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    """`all-linear` (every linear layer except the head), or a list of module names (`["q_proj", "v_proj"]`)."""
    use_rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead of alpha / r."""
    init: str = "default"
    """How LoRA-A starts (LoRA-B is zero): `default` (Kaiming uniform) or `gaussian`; `orthogonal` starts both non-zero
    with B @ A = 0."""
    start_from: str | None = None
    """Folder of an adapter to go on training, or `demo` for the packaged one; its own rank and modules then hold."""


def lora_config(spec: LoraSpec) -> LoraConfig:
    """PEFT's configuration of the adapter.

    Raises: ConfigError for a value outside its range, and for adapters on the output head, whose weight the fused
        log-prob kernel reads directly.
    """
    from peft import LoraConfig

    targets = spec.target_modules if spec.target_modules == "all-linear" else list(spec.target_modules)
    if (isinstance(spec.target_modules, str) and targets != "all-linear") or not targets:
        raise ConfigError(f"target_modules={spec.target_modules!r} must be 'all-linear' or a list of module names.")
    if heads := [name for name in targets if name.rsplit(".", 1)[-1] in _HEAD_NAMES]:
        raise ConfigError(
            f"target_modules names the output head ({', '.join(heads)}): the fused log-probs read its weight directly, "
            "so an adapter there would not be trained. Leave it out; `all-linear` already does."
        )
    check_choice(
        "init",
        spec.init,
        LORA_INITS,
        fix="Inits that change the base weights (PiSSA, OLoRA, LoftQ, ...) are left out: the adapter would not fit the "
        "released base any more. Set lora.init.",
    )
    if spec.r < 1 or spec.alpha <= 0 or not 0 <= spec.dropout < 1:
        raise ConfigError(
            f"r={spec.r}, alpha={spec.alpha}, dropout={spec.dropout}: r must be at least 1, alpha positive "
            "and dropout in [0, 1). Set them so."
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        use_rslora=spec.use_rslora,
        init_lora_weights=LORA_INITS[spec.init],
    )


def base_fingerprint(model: Any) -> str:
    """Name of the frozen base under `model`, the same with and without a LoRA adapter: `<core>-<kind>-<linear>`.

    - core: SHA-256 (16 hex digits) over the architecture fields of the config and the sign bits of up to 1024 evenly
      spaced elements of every vector, embedding and head. Rounding to another float type keeps signs, and bitsandbytes
      leaves these unquantised, so float32, bfloat16, float16 and 4-bit loads of one model share it.
    - kind: how the linear layers are held: `float`, `nf4` or `fp4`.
    - linear: the same over the linear layers, zeros when quantised: 4-bit codes may differ by a rounding between a GPU
      and a CPU.

    It tells models apart, fine-tunes of one model included; it is no proof against a forger.
    """
    config = model.config.get_text_config()
    core, linear = hashlib.sha256(), hashlib.sha256()
    core.update(json.dumps([[name, getattr(config, name, None)] for name in _ARCHITECTURE]).encode())
    kind = "float"
    for name, weight in sorted(_base_weights(model), key=lambda item: item[0]):
        if (quantised := getattr(weight, "quant_state", None)) is not None:
            kind = quantised.quant_type
            continue
        in_core = weight.ndim < 2 or weight.shape[0] == config.vocab_size
        (core if in_core else linear).update(name.encode() + b"\0" + _sample(weight))
    return f"{core.hexdigest()[:16]}-{kind}-{linear.hexdigest()[:16] if kind == 'float' else '0' * 16}"


def _base_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    found = []
    for name, weight in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        found.append((name, weight))
    return found


def _sample(weight: torch.Tensor) -> bytes:
    import torch

    flat = weight.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // _SAMPLES_PER_WEIGHT)][:_SAMPLES_PER_WEIGHT]
    return bytes(torch.signbit(picked).to("cpu", torch.uint8).tolist())


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints name one model: equal cores, and equal linear layers where neither is quantised."""
    (core_a, *held_a), (core_b, *held_b) = one.split("-"), other.split("-")
    return core_a == core_b and (held_a == held_b or not held_a[0] == held_b[0] == "float")


def write_fingerprint(adapter_dir: Path, model: Any, *, revision: str | None = None) -> None:
    """Write `mel_lite.json` beside an adapter: the base under `model`, how it was loaded, and its fingerprint."""
    from mel_lite import __version__

    base = _describe_base(model, revision)
    record = {
        "format": 1,
        "mel_lite": __version__,
        "base": {key: getattr(base, key) for key in _RECORDED},
        "base_fingerprint": base_fingerprint(model),
    }
    (adapter_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _describe_base(model: Any, revision: str | None) -> ModelSpec:
    config = model.config
    name = config._name_or_path or "unknown"
    weights = [weight for _, weight in _base_weights(model)]
    dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
    four_bit = next((weight.quant_state for weight in weights if getattr(weight, "quant_state", None)), None)
    return ModelSpec(
        name=DEMO if name == str(demo_path()) else name,
        revision=revision or getattr(config, "_commit_hash", None),
        dtype=str(dtype).removeprefix("torch."),
        load_in_4bit=four_bit is not None,
        quant_type=four_bit.quant_type if four_bit else "nf4",
        double_quant=four_bit.nested if four_bit else True,
    )


def find_adapter(folder: Path | str) -> Path:
    """The adapter in a run, checkpoint or adapter folder: itself, its `adapter/`, or its newest whole checkpoint.

    `demo` is the packaged warm start of the demo model. Raises: ModelError when there is none.
    """
    folder = DEMO_ADAPTER if str(folder) == DEMO else Path(folder)
    named = {
        re.fullmatch(r"checkpoint-(\d+)", path.parent.name): path.parent for path in folder.glob("*/manifest.json")
    }
    checkpoints = {int(match[1]): path for match, path in named.items() if match}  # not those that were set aside
    places = [folder, folder / "adapter", *(checkpoints[step] for step in sorted(checkpoints, reverse=True))]
    for place in places:
        if (place / "adapter_config.json").is_file():
            return place
    raise ModelError(
        f"{str(folder)!r} holds no adapter: no adapter_config.json in it, in adapter/, or in a checkpoint. Give a run "
        "folder that saved one, or the folder PEFT saved."
    )


def adapter_rank(lora: LoraSpec) -> int:
    """Rank of the adapter a run trains: that of the one it starts from, else `lora.r`. Raises: ModelError."""
    if lora.start_from is None:
        return lora.r
    return int(json.loads((find_adapter(lora.start_from) / "adapter_config.json").read_text(encoding="utf-8"))["r"])


def adapter_base(adapter_dir: Path) -> ModelSpec:
    """The base an adapter says it was trained on, and how it was loaded then.

    For an adapter without `mel_lite.json` it is the base PEFT wrote down, unquantised, in this machine's own dtype.

    Raises: ModelError when the folder holds no LoRA adapter in safetensors.
    """
    config, record = _read_adapter(adapter_dir)
    if record:
        return ModelSpec(**record["base"])
    return ModelSpec(name=config.get("base_model_name_or_path") or "unknown", revision=config.get("revision"))


def _read_adapter(adapter_dir: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """PEFT's configuration of an adapter folder, and our record when there is one."""
    if not (adapter_dir / "adapter_config.json").is_file():
        raise ModelError(f"adapter={str(adapter_dir)!r} has no adapter_config.json. Give the folder PEFT saved.")
    if not (adapter_dir / WEIGHTS).is_file():
        raise ModelError(
            f"adapter={str(adapter_dir)!r} has no {WEIGHTS}; pickled weights (.bin) are never loaded. Save it again "
            "with a current PEFT."
        )
    try:
        config = dict(json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8")))
        record_file = adapter_dir / RECORD
        record = json.loads(record_file.read_text(encoding="utf-8")) if record_file.is_file() else None
        if record is not None:
            ModelSpec(**record["base"])
            same_base(record["base_fingerprint"], record["base_fingerprint"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"adapter={str(adapter_dir)!r}: unreadable adapter_config.json or {RECORD} ({error})."
        ) from error
    if config.get("peft_type") != "LORA":
        raise ModelError(f"adapter={str(adapter_dir)!r} is of type {config.get('peft_type')}; only LoRA is supported.")
    return config, record


def attach_adapter(model: PreTrainedModel, adapter_dir: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved LoRA adapter on its base; `model` is changed in place.

    An adapter without `mel_lite.json` is checked by the base name PEFT wrote (a warning) and by its weights' shapes.

    Raises: ModelError when the adapter was trained on another base, does not fit this one, lacks weights, or (with
        `trainable`) adapts the output head.
    """
    import torch
    from peft import PeftModel

    if isinstance(model, PeftModel):
        raise ModelError("the model already carries an adapter. Attach to the bare base (`load_base`).")
    config, record = _read_adapter(adapter_dir)
    _check_base(model, adapter_dir, config, record)
    device = str(next(model.parameters()).device)
    try:
        peft_model = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable, torch_device=device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a garbled or hostile file meets whatever PEFT did not expect
        raise ModelError(
            f"adapter={str(adapter_dir)!r}, trained on {_base_name(config, record)}, does not fit "
            f"{model.config._name_or_path}: {str(error)[:500]}"
        ) from error
    _check_complete(peft_model, adapter_dir)
    # The base was found to be the same, wherever it lies: PEFT would ask the Hub for the name in the file at each save.
    peft_model.peft_config["default"].base_model_name_or_path = model.config._name_or_path
    if trainable and hasattr(peft_model.get_output_embeddings(), "base_layer"):
        raise ModelError(f"adapter={str(adapter_dir)!r} adapts the output head, which MEL-Lite cannot train further.")
    return peft_model


def check_base(model: Any, adapter_dir: Path) -> None:
    """Raise ModelError when the adapter in a folder was trained on another base than `model`'s."""
    _check_base(model, adapter_dir, *_read_adapter(adapter_dir))


def _base_name(config: dict[str, Any], record: dict[str, Any] | None) -> str:
    return repr(record["base"]["name"] if record else config.get("base_model_name_or_path"))


def _check_base(model: Any, adapter_dir: Path, config: dict[str, Any], record: dict[str, Any] | None) -> None:
    name = model.config._name_or_path
    if record is None:
        if config.get("base_model_name_or_path") != name:
            logger.warning("%s was trained on %s, not on %s.", adapter_dir, _base_name(config, None), repr(name))
        return
    here = base_fingerprint(model)
    if not same_base(record["base_fingerprint"], here):
        raise ModelError(
            f"adapter={str(adapter_dir)!r} was trained on {_base_name(config, record)} (fingerprint "
            f"{record['base_fingerprint']}), but this model is {name!r} ({here}): on another base it is noise. "
            "Load the base it was trained on."
        )


def _check_complete(model: PeftModel, adapter_dir: Path) -> None:
    """PEFT only warns when a file lacks weights, and ignores those it has no place for; both mean a wrong adapter."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter_dir / WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    homeless = {name for name in saved - wanted if ".lora_" in name}
    if problem := sorted((wanted - saved) | homeless):
        what = "lacks" if problem[0] in wanted else "has weights this base has no place for, such as"
        raise ModelError(f"adapter={str(adapter_dir)!r} {what} {problem[0]} ({len(problem)} such weights in all).")
