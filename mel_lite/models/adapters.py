"""LoRA adapters: configuration, saving, and checks that an adapter belongs to a base model.

An adapter is useless without the exact base it was trained on. `mel_lite.json`, next to PEFT's files, identifies that
base and is checked whenever the adapter is attached.
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

from mel_lite.deferred import building_plain_layers
from mel_lite.errors import ConfigError, ModelError, check_choice
from mel_lite.files import share_weights
from mel_lite.models.demo import DEMO_ADAPTER, demo_path
from mel_lite.models.load import ModelSpec
from mel_lite.models.origin import DEMO
from mel_lite.models.placeholders import gathered, has_placeholders

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
"""Fields of a ModelSpec that determine its weights, which leaves out how a run samples from them."""


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """LoRA adapter to train. `lora: null` trains all weights instead."""

    r: int = 16
    """Rank."""
    alpha: int = 32
    """Numerator of the update's scale, `alpha / r`."""
    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input in training, in [0, 1)."""
    target_modules: str | Sequence[str] = "all-linear"
    """`all-linear` (every linear layer except the head), or a list of module names (`["q_proj", "v_proj"]`)."""
    use_rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead of alpha / r."""
    init: str = "default"
    """Initialization of LoRA-A (LoRA-B is zero): `default` (Kaiming uniform) or `gaussian`. With `orthogonal`, both are
    non-zero and B @ A = 0."""
    start_from: str | None = None
    """Folder of an adapter to continue training, or `demo` for the packaged one. Its own rank and modules apply."""


def lora_config(spec: LoraSpec) -> LoraConfig:
    """Build PEFT's configuration of the adapter.

    Raises: ConfigError for a value outside its range, and for an adapter on the output head, whose weight the fused
        log-prob kernel reads directly.
    """
    from peft import LoraConfig

    targets = spec.target_modules if spec.target_modules == "all-linear" else list(spec.target_modules)
    if (isinstance(spec.target_modules, str) and targets != "all-linear") or not targets:
        raise ConfigError(f"target_modules={spec.target_modules!r} must be 'all-linear' or a list of module names.")
    if heads := [name for name in targets if name.rsplit(".", 1)[-1] in _HEAD_NAMES]:
        raise ConfigError(
            f"target_modules names the output head ({', '.join(heads)}): the fused log-probs read its weight directly, "
            "so an adapter on it would not be trained. Remove it from the list; `all-linear` also excludes it."
        )
    check_choice(
        "init",
        spec.init,
        LORA_INITS,
        fix="Inits that change the base weights (PiSSA, OLoRA, LoftQ, ...) are not supported: the adapter would no "
        "longer fit the released base. Set lora.init.",
    )
    if spec.r < 1 or spec.alpha <= 0 or not 0 <= spec.dropout < 1:
        raise ConfigError(
            f"r={spec.r}, alpha={spec.alpha}, dropout={spec.dropout}: r must be at least 1, alpha positive "
            "and dropout in [0, 1). Correct these values."
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
    """Compute `<core>-<kind>-<linear>`, which identifies the frozen base of `model`, with or without a LoRA adapter.

    - core: SHA-256 (16 hex digits) over the architecture fields of the config and the sign bits of up to 1024 evenly
      spaced elements of every vector, embedding and head. Rounding to another float type keeps signs, and bitsandbytes
      does not quantize these, so float32, bfloat16, float16 and 4-bit loads of one model share it.
    - kind: storage type of the linear layers: `float`, `nf4` or `fp4`.
    - linear: like core, over the linear layers; zeros when they are quantized, since 4-bit codes may differ by rounding
      between a GPU and a CPU.

    It distinguishes models, including fine-tunes of one model. It does not protect against forgery.
    """
    config = model.config.get_text_config()
    core, linear = hashlib.sha256(), hashlib.sha256()
    core.update(json.dumps([[name, getattr(config, name, None)] for name in _ARCHITECTURE]).encode())
    kind = "float"
    for name, weight in sorted(base_weights(model), key=lambda item: item[0]):
        weight = gathered(weight)
        if (quant_state := getattr(weight, "quant_state", None)) is not None:
            kind = quant_state.quant_type
            continue
        in_core = weight.ndim < 2 or weight.shape[0] == config.vocab_size
        (core if in_core else linear).update(name.encode() + b"\0" + _sample(weight))
    return f"{core.hexdigest()[:16]}-{kind}-{linear.hexdigest()[:16] if kind == 'float' else '0' * 16}"


_BASE_PARTS = ("token_adapter.", "base_layer.", "original_module.")
"""Parts of the names that PEFT's wrappers insert before a weight of the base."""


def base_weights(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the weights of the base by the names they have without an adapter."""
    wrapped, marks = [], ["lora_", ".modules_to_save.", ".trainable_tokens_"]
    if hasattr(model, "peft_config"):  # PEFT's other methods have weights of any name, but only in these modules
        wrapped = [f"{name}." for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")]
        marks += filter(None, [getattr(model.base_model, "prefix", None)])
    found = []
    for name, weight in model.named_parameters():
        inside = [name.removeprefix(prefix) for prefix in wrapped if name.startswith(prefix)]
        if any(mark in name for mark in marks) or not all(rest.startswith(_BASE_PARTS) for rest in inside):
            continue
        name = name.removeprefix("base_model.model.")
        while any(f".{part}" in name for part in _BASE_PARTS):  # wrappers may be nested, as around fused experts
            for part in _BASE_PARTS:
                name = name.replace(f".{part}", ".")
        found.append((name, weight))
    return found


def _sample(weight: torch.Tensor) -> bytes:
    import torch

    flat = weight.detach().reshape(-1)
    picked = flat[:: max(1, flat.numel() // _SAMPLES_PER_WEIGHT)][:_SAMPLES_PER_WEIGHT]
    return bytes(torch.signbit(picked).to("cpu", torch.uint8).tolist())


def same_base(one: str, other: str) -> bool:
    """Return True if two fingerprints identify the same model.

    Their cores must be equal, and their linear layers as well unless one of them is quantized.
    """
    (core_a, *linear_a), (core_b, *linear_b) = one.split("-"), other.split("-")
    return core_a == core_b and (linear_a == linear_b or not linear_a[0] == linear_b[0] == "float")


def base_record(model: Any) -> dict[str, Any]:
    """Return the content of `mel_lite.json`: the base of `model`, how it was loaded, and its fingerprint."""
    from mel_lite import __version__

    base = _describe_base(model)
    return {
        "format": 1,
        "mel_lite": __version__,
        "base": {key: getattr(base, key) for key in _RECORDED},
        "base_fingerprint": base_fingerprint(model),
    }


def write_fingerprint(adapter_dir: Path, model: Any, *, revision: str | None = None) -> None:
    """Write the record of the base of `model` next to an adapter."""
    write_record(adapter_dir, base_record(model), revision=revision)


def write_record(adapter_dir: Path, record: dict[str, Any], *, revision: str | None = None) -> None:
    """Write `mel_lite.json` next to an adapter; `revision` replaces the recorded one.

    Also replaces local paths in PEFT's files, which name nothing on another machine, and PEFT's unfilled model card.
    """
    if revision:
        record = record | {"base": record["base"] | {"revision": revision}}
    (adapter_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    config_file = adapter_dir / "adapter_config.json"
    if not config_file.is_file():
        return
    hub_id = hub_id_of(record["base"]["name"])
    config = json.loads(config_file.read_text(encoding="utf-8")) | {"base_model_name_or_path": hub_id}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    (adapter_dir / "README.md").write_text(adapter_card(hub_id), encoding="utf-8")
    share_weights(adapter_dir)


def hub_id_of(name: str) -> str | None:
    """Return the Hub id of a base's name or of its folder in the Hub cache; None for any other folder."""
    if cached := re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", Path(name).as_posix()):
        return f"{cached[1]}/{cached[2]}"
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
    return name if is_id else None


def adapter_card(hub_id: str | None) -> str:
    """Return the model card of an adapter folder. `hub_id`: its base on the Hub, if it is there."""
    base = [f"base_model: {hub_id}"] if hub_id else []
    front = ["---", "library_name: peft", *base, "tags: [lora, mel-lite, mel, grpo]", "---"]
    origin = f"of `{hub_id}`" if hub_id else "of a local base model"
    text = f"A LoRA adapter {origin}. {RECORD} identifies the exact base and how it was loaded."
    return "\n".join([*front, "", "# Trained with MEL-Lite", "", text, ""])


def base_name(model: Any) -> str:
    """Return the name or folder that a model's base was loaded from; `demo` for the demo model."""
    name = str(model.config._name_or_path or "unknown")
    return DEMO if name == str(demo_path()) else name


def _describe_base(model: Any) -> ModelSpec:
    config = model.config
    weights = [weight for _, weight in base_weights(model)]
    dtype = next(weight.dtype for weight in weights if weight.is_floating_point())
    four_bit = next((weight.quant_state for weight in weights if getattr(weight, "quant_state", None)), None)
    return ModelSpec(
        name=base_name(model),
        revision=getattr(config, "_commit_hash", None),
        dtype=str(dtype).removeprefix("torch."),
        load_in_4bit=four_bit is not None,
        quant_type=four_bit.quant_type if four_bit else "nf4",
        double_quant=four_bit.nested if four_bit else True,
    )


def find_adapter(folder: Path | str) -> Path:
    """Find the adapter in a run, checkpoint or adapter folder: itself, its `adapter/`, or its newest whole checkpoint.

    `demo` is the packaged warm start of the demo model. Raises: ModelError when there is no adapter.
    """
    folder = DEMO_ADAPTER if str(folder) == DEMO else Path(folder)
    named = {
        re.fullmatch(r"checkpoint-(\d+)", path.parent.name): path.parent for path in folder.glob("*/manifest.json")
    }
    checkpoints = {
        int(match[1]): path for match, path in named.items() if match
    }  # without damaged ones, which were renamed
    places = [folder, folder / "adapter", *(checkpoints[step] for step in sorted(checkpoints, reverse=True))]
    for place in places:
        if (place / "adapter_config.json").is_file():
            return place
    raise ModelError(
        f"{str(folder)!r} holds no adapter: no adapter_config.json in it, in adapter/, or in a checkpoint. Give a run "
        "folder with a saved adapter, or the folder PEFT saved."
    )


def adapter_rank(lora: LoraSpec) -> int:
    """Return the rank of the adapter that a run trains: of `start_from` if set, else `lora.r`. Raises: ModelError."""
    if lora.start_from is None:
        return lora.r
    return int(json.loads((find_adapter(lora.start_from) / "adapter_config.json").read_text(encoding="utf-8"))["r"])


def adapter_base(adapter_dir: Path) -> ModelSpec:
    """Return the base that an adapter was trained on, according to its files, and how it was loaded.

    For an adapter without `mel_lite.json`, this is the base that PEFT recorded, unquantized, in this machine's default
    dtype.

    Raises: ModelError when the folder holds no LoRA adapter in safetensors.
    """
    config, record = _read_adapter(adapter_dir)
    if record:
        return ModelSpec(**record["base"])
    return ModelSpec(name=config.get("base_model_name_or_path") or "unknown", revision=config.get("revision"))


def _read_adapter(adapter_dir: Path, *, only_lora: bool = True) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Read PEFT's configuration in an adapter folder, and the content of `mel_lite.json` if it exists."""
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
    if only_lora and config.get("peft_type") != "LORA":
        raise ModelError(f"adapter={str(adapter_dir)!r} is of type {config.get('peft_type')}; only LoRA is supported.")
    return config, record


def attach_adapter(model: PreTrainedModel, adapter_dir: Path, *, trainable: bool = False) -> PeftModel:
    """Attach a saved LoRA adapter to its base. Changes `model` in place.

    An adapter without `mel_lite.json` is checked by the base name that PEFT recorded (a warning) and by the shapes of
    its weights.

    Raises: ModelError when the adapter was trained on another base, does not fit this one, has missing weights, or
        (with `trainable`) adapts the output head.
    """
    import torch
    from peft import PeftModel

    if isinstance(model, PeftModel):
        raise ModelError("the model already has an adapter. Attach to the plain base model (`load_base`).")
    config, record = _read_adapter(adapter_dir)
    _check_base(model, adapter_dir, config, record)
    device = str(next(model.parameters()).device)
    try:
        with building_plain_layers():
            peft_model = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=trainable, torch_device=device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a corrupt or hostile file may raise anything in PEFT
        raise ModelError(
            f"adapter={str(adapter_dir)!r}, trained on {_base_name(config, record)}, does not fit "
            f"{model.config._name_or_path}: {str(error)[:500]}"
        ) from error
    _check_complete(peft_model, adapter_dir)
    # The base is the right one, whatever its path: PEFT would look up the recorded name on the Hub at each save.
    peft_model.peft_config["default"].base_model_name_or_path = model.config._name_or_path
    if trainable and hasattr(peft_model.get_output_embeddings(), "base_layer"):
        raise ModelError(f"adapter={str(adapter_dir)!r} adapts the output head, which MEL-Lite cannot train further.")
    return peft_model


def check_base(model: Any, adapter_dir: Path) -> None:
    """Check the base of the adapter in a folder. Raises: ModelError when it is not the base of `model`."""
    _check_base(model, adapter_dir, *_read_adapter(adapter_dir, only_lora=False))


def _base_name(config: dict[str, Any], record: dict[str, Any] | None) -> str:
    return repr(record["base"]["name"] if record else config.get("base_model_name_or_path"))


def _check_base(model: Any, adapter_dir: Path, config: dict[str, Any], record: dict[str, Any] | None) -> None:
    name = model.config._name_or_path
    if record is None:
        if config.get("base_model_name_or_path") != name:
            logger.warning("%s was trained on %s, not on %s.", adapter_dir, _base_name(config, None), repr(name))
        return
    here = base_fingerprint(model)
    if not has_placeholders() and not same_base(record["base_fingerprint"], here):
        raise ModelError(
            f"adapter={str(adapter_dir)!r} was trained on {_base_name(config, record)} (fingerprint "
            f"{record['base_fingerprint']}), but this model is {name!r} ({here}): on another base it is meaningless. "
            "Load the base it was trained on."
        )


def _check_complete(model: PeftModel, adapter_dir: Path) -> None:
    """Check that the file has exactly the weights of the adapter. Raises: ModelError.

    PEFT only warns about missing weights and ignores unexpected ones. Both mean a wrong adapter.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter_dir / WEIGHTS, framework="pt") as file:
        saved = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    unexpected = {name for name in saved - expected if ".lora_" in name}
    if problem := sorted((expected - saved) | unexpected):
        what = "is missing the weight" if problem[0] in expected else "has a weight that this base has no layer for:"
        raise ModelError(f"adapter={str(adapter_dir)!r} {what} {problem[0]} ({len(problem)} such weights in all).")
