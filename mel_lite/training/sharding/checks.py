"""Refuse what cannot be trained with FSDP or DeepSpeed, before a model is loaded."""

from __future__ import annotations

import logging
import os
from typing import Any

from mel_lite.config import MELConfig
from mel_lite.engines.unsloth import is_unsloth
from mel_lite.errors import ConfigError

logger = logging.getLogger(__name__)


def spread_by(args: Any) -> str | None:
    """Return what spreads the weights of a run over its processes: "FSDP1", "FSDP2" or "ZeRO-3"; None if nothing does.

    Reads the trainer's arguments and the environment of `accelerate launch`.
    """
    if args.deepspeed_plugin is not None:
        return "ZeRO-3" if args.deepspeed_plugin.zero_stage == 3 else None
    if args.fsdp_plugin_args is not None:
        return f"FSDP{args.fsdp_plugin_args['fsdp_version']}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return None


def check_sharding(args: MELConfig, *, load_in_4bit: bool = False, adapter: bool | None = None) -> None:
    """Check the options of a run whose weights are spread. `adapter`: it trains one; None = not known yet.

    Raises: ConfigError with the fix.
    """
    by = spread_by(args)
    if by is None:
        return
    if by == "FSDP1":
        raise ConfigError(
            "fsdp_version=1: its weights can be gathered for one forward only, not for a phase of sampling. Set "
            "fsdp_version: 2 in the config of accelerate (fsdp_config={'version': 2} in Python)."
        )
    if load_in_4bit:
        raise ConfigError(
            f"load_in_4bit=true with {by}: the 4-bit weights would stay whole on every GPU. Set "
            "model.load_in_4bit=false, or train the 4-bit base with DDP or ZeRO-2."
        )
    if args.engine_url is not None:
        raise ConfigError(
            f"engine_url={args.engine_url!r} with {by}: no process has the whole adapter to send. Use DDP or ZeRO-2, "
            "or unset engine_url."
        )
    if by == "FSDP2" and "8bit" in str(getattr(args.optim, "value", args.optim)):
        raise ConfigError(
            f"optim={args.optim.value} with FSDP2: bitsandbytes cannot update spread weights. Set train.optim="
            "adamw_torch, whose moments are spread, too."
        )
    if by == "ZeRO-3":
        _check_zero3(args, adapter)
    if args.top_entropy_quantile < 1.0:
        _check_joint(args, by, f"top_entropy_quantile={args.top_entropy_quantile:g}", "top_entropy_quantile=1.0")
    if args.use_adaptive_entropy:
        _check_joint(args, by, "use_adaptive_entropy=True", "use_adaptive_entropy=False")


def _check_joint(args: MELConfig, by: str, option: str, fix: str) -> None:
    """Refuse a loss over all rows of a micro-batch at once where processes would need different numbers of blocks."""
    if args.max_micro_batch_tokens or args.with_meta_experience:
        raise ConfigError(
            f"{option} with {by}: this loss is over a whole micro-batch, and processes would cut theirs into different "
            f"numbers of blocks. Set {fix}."
        )


def _check_zero3(args: MELConfig, adapter: bool | None) -> None:
    if not args.ds3_gather_for_generation:
        raise ConfigError(
            "ds3_gather_for_generation=False: processes sample and score different numbers of texts, which they can "
            "only do over gathered weights. Set it to True, or use ZeRO-2."
        )
    zero = args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    if adapter is False and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ConfigError(
            "stage3_gather_16bit_weights_on_model_save=False without an adapter: the trained model would be saved in "
            "pieces. Set it to true in DeepSpeed's config (zero3_save_16bit_model: true in accelerate's)."
        )


def settle_sharding(trainer: Any) -> None:
    """Turn off what spread gradients do not allow, and keep log-probs in float32. Warns of what changes.

    Raises: ConfigError for a model whose weights must not be spread.
    """
    args, by = trainer.args, spread_by(trainer.args)
    if not trainer.sharding.in_lockstep:
        return
    if by is not None and is_unsloth(trainer.model):
        raise ConfigError(
            f"{by} with a model that Unsloth has loaded: its generation cannot gather spread weights. Load the model "
            "with transformers (--engine hf)."
        )
    if trainer.aux_loss_enabled and by is not None:
        _check_joint(args, by, f"router_aux_loss_coef={trainer.router_aux_loss_coef}", "router_aux_loss_coef=0")
    if args.grad_norm_every:
        logger.warning(
            "grad_norm_every=%s: the gradients of single loss terms are not measured with FSDP or DeepSpeed.",
            args.grad_norm_every,
        )
        args.grad_norm_every = 0
    if trainer.sharding.fsdp:
        trainer.sharding.settle_fsdp()
