"""Refuse adapters that cannot be trained, saved and attached again, before a step is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mel_lite.deferred import building_plain_layers
from mel_lite.errors import ConfigError, MelLiteError, ModelError
from mel_lite.models.adapters import base_fingerprint, base_weights
from mel_lite.text import first_line

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Prefixes of `init_lora_weights` that also change the base weights."""
_ELSEWHERE = "or train it with TRL's GRPOTrainer"


def check_adapter_config(config: Any) -> None:
    """Refuse a PEFT configuration whose adapter could not be trained or used after training. Raises: ConfigError."""
    name = type(config).__name__
    if getattr(config, "inference_mode", False):
        raise ConfigError(f"{name}(inference_mode=True) freezes the adapter: nothing would be trained. Remove it.")
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
        raise ConfigError(
            f"{name}: prompt-learning adapters ({_kind(config)}) are not supported, since the fused log-probs would be "
            f"computed without their virtual tokens. Use a LoraConfig, {_ELSEWHERE}."
        )
    if getattr(config, "lora_alpha", None) == 0:
        raise ConfigError(
            f"{name}(lora_alpha=0) multiplies the adapter by 0: nothing would be trained. Use r or 2 * r."
        )
    _check_tokens(name, getattr(config, "trainable_token_indices", None))
    init = str(getattr(config, "init_lora_weights", True)).lower()
    if init.startswith(CHANGES_BASE):
        raise ConfigError(
            f"{name}(init_lora_weights={init!r}) changes the base weights: the trained adapter would not fit the "
            "released base, so it could not be exported or loaded. Use True, 'gaussian' or 'orthogonal'."
        )
    targets = getattr(config, "target_modules", None)
    listed = targets if isinstance(targets, (list, tuple, set)) else [targets]
    if "lm_head" in {str(each).rsplit(".", 1)[-1] for each in listed}:
        raise ConfigError(
            f"{name}: target_modules names the output head (lm_head), whose weight the log-probs read directly. Remove "
            "it, or train the whole head with modules_to_save=['lm_head']."
        )


def _check_tokens(name: str, indices: Any) -> None:
    for listed in indices.values() if isinstance(indices, dict) else [indices]:
        if listed is not None and (len(listed) == 0 or min(listed) < 0):
            raise ConfigError(
                f"{name}(trainable_token_indices={indices!r}) must list token ids from 0 on. Remove it to train none."
            )


def _kind(config: Any) -> str:
    kind = config.peft_type
    return str(getattr(kind, "value", kind))


def check_adapters(model: Any, peft_config: Any) -> None:
    """Check the adapters that a trainer is given: in a PeftModel, or as a configuration.

    Raises: ConfigError, or ModelError for a vocabulary that was resized in memory only.
    """
    configs = [peft_config] if peft_config is not None else []
    if is_peft(model):
        check_trainable(model)
        _check_active(model)
        configs += [model.peft_config[name] for name in model.active_adapters if name in model.peft_config]
    else:
        _check_injected(model)
    for config in configs:
        check_adapter_config(config)
    if configs and not isinstance(model, str):
        _check_vocabulary(model)


def _check_active(model: Any) -> None:
    """Refuse a PeftModel whose trained adapter would not be the one that a checkpoint holds at its top.

    Raises: ConfigError.
    """
    active = list(model.active_adapters)
    if active != ["default"]:
        raise ConfigError(
            f"the model's active adapter is {', '.join(map(repr, active)) or 'none'}: a checkpoint holds the one "
            "called 'default' at its top, and export and resume read that one. Load the adapter to train under this "
            "name, as PeftModel.from_pretrained(base, folder, is_trainable=True) does, and activate no other."
        )
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ConfigError(
            "the adapter is merged into the base: it gets no gradient. Call model.unmerge_adapter() first."
        )


def _check_injected(model: Any) -> None:
    """Refuse adapter layers without a PeftModel around them: a checkpoint would be no adapter and no loadable model.

    Raises: ConfigError.
    """
    if getattr(model, "_hf_peft_config_loaded", False) or isinstance(model, str):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            "the model has adapter layers but is no PeftModel, so neither an adapter nor the base could be saved. "
            "Build it with peft.get_peft_model, or pass the plain model and a peft_config."
        )


def is_peft(model: Any) -> bool:
    """Return True for a model that PEFT has wrapped."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _check_vocabulary(model: Any) -> None:
    """Refuse an adapter on embeddings that were resized after loading: the saved base has other ones.

    Looks at local files only. Raises: ModelError.
    """
    from transformers import AutoConfig

    config = model.config.get_text_config()
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        return
    try:
        saved = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False).get_text_config()
    except Exception:  # not on this machine, or not readable: there is nothing to compare with
        return
    before, now = getattr(saved, "vocab_size", None), getattr(config, "vocab_size", None)
    if before != now:
        raise ModelError(
            f"the vocabulary was resized from {before} to {now} after {name!r} was loaded. An adapter would fit only "
            "this resized base. Save it with model.save_pretrained(FOLDER) and load the model from there."
        )


@contextmanager
def building_adapter(trainer: Any, model: Any, peft_config: Any) -> Iterator[None]:
    """Check adapters before and after TRL builds a trainer in the block, and convert what PEFT raises.

    Raises: ConfigError, ModelError.
    """
    check_adapters(model, peft_config)
    compared = peft_config is not None and not isinstance(model, str) and not is_peft(model)
    before = base_fingerprint(model) if compared else None
    try:
        with building_plain_layers():
            yield
    except MelLiteError:
        raise
    except Exception as error:
        if isinstance(error, ValueError | NotImplementedError) and "peft" in str(error).lower():  # TRL's, in words
            raise ConfigError(str(error)) from error
        if peft_config is None or not _raised_in_peft(error):
            raise
        raise ConfigError(
            f"peft_config={type(peft_config).__name__}: PEFT cannot build this adapter ({first_line(error)}). Correct "
            "the configuration."
        ) from error
    check_trainable(trainer.model)
    if is_peft(trainer.model):
        _check_frozen_base(trainer.model)
    if before is not None and base_fingerprint(trainer.model) != before:
        raise ConfigError(
            f"{type(peft_config).__name__} changed the base model when it was built (weights or layers): the trained "
            "adapter would not fit the released base. Use options that leave the base as it is."
        )


def _check_frozen_base(model: Any) -> None:
    """Refuse to train weights of the base along with an adapter: the adapter would fit only the changed base.

    Raises: ConfigError.
    """
    if thawed := [name for name, weight in base_weights(model) if weight.requires_grad]:
        raise ConfigError(
            f"{len(thawed)} weights of the base itself are trainable along with the adapter (first: {thawed[0]}): the "
            "adapter would fit only the changed base. Freeze them (bias='none' in the configuration), or name their "
            "modules in modules_to_save."
        )


def _raised_in_peft(error: BaseException) -> bool:
    link = error.__traceback__
    while link is not None:
        if link.tb_frame.f_globals.get("__name__", "").split(".")[0] == "peft":
            return True
        link = link.tb_next
    return False


def check_trainable(model: Any) -> None:
    """Refuse a model without trainable weights: a run would log rewards and losses but change nothing.

    Raises: ModelError.
    """
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ModelError(
            f"no weight of {type(model).__name__} is trainable, so nothing would be trained. Pass a peft_config, load "
            "the adapter with is_trainable=True, or set requires_grad of the weights to train."
        )
