"""Decide which exact savings a step uses: rows without advantage left out, prompts shared, the adapter merged.

An option that is None is on where it changes nothing but rounding. A checkpoint records what was on, and a resumed run
keeps it, so its remaining steps equal those of a run without interruption.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from mel_lite.engines.merged import why_not_merged
from mel_lite.engines.unsloth import is_unsloth
from mel_lite.errors import ConfigError
from mel_lite.models.attention import let_prompts_be_shared, rounding_nats, why_not_full
from mel_lite.models.modes import evaluating
from mel_lite.text import first_line
from mel_lite.training.batches.packing import Row, pack
from mel_lite.training.batches.shared_prompts import pack_shared
from mel_lite.training.scoring import score

logger = logging.getLogger(__name__)

_IN_BUCKETS = "sample_in_buckets"


class Savings:
    """What a step of one trainer leaves out. Its state is part of a checkpoint."""

    def __init__(self, trainer: Any) -> None:
        args = trainer.args
        names = ("skip_zero_advantage", "share_prompts", "merge_to_sample")
        self._asked = {name: getattr(args, name) for name in names} | {_IN_BUCKETS: args.share_prompts}
        self._on = {name: self._asked[name] is not False for name in self._asked}
        if args.skip_zero_advantage is None:
            self._on["skip_zero_advantage"] = _can_skip(trainer)
        self._uncompared: Any = None
        """The model whose shared prompts are compared with padded rows at the first use, after the first rollout."""
        if args.share_prompts is not False:
            problem = _why_not_shared(trainer)
            if args.share_prompts and (problem := problem or _differs(trainer.model)) is not None:
                raise not_shared(problem)
            self._on["share_prompts"] = problem is None
            self._uncompared = None if args.share_prompts else trainer.model
        if args.share_prompts is None:
            self._on[_IN_BUCKETS] = trainer.accelerator.device.type == "cpu"
        if args.merge_to_sample and (problem := why_not_merged(trainer.model)) is not None:
            raise ConfigError(f"merge_to_sample=True with {problem}. Leave it unset to merge where it changes nothing.")

    @property
    def skips_zero_advantage(self) -> bool:
        """True when completions whose advantage is 0 stay out of the forward."""
        return self._on["skip_zero_advantage"]

    @property
    def shares_prompts(self) -> bool:
        """True when the completions of one prompt share its tokens in a forward."""
        if self._on["share_prompts"] and self._uncompared is not None:
            self._on["share_prompts"] = _differs(self._uncompared) is None
            self._uncompared = None
        return self._on["share_prompts"]

    @property
    def merges_to_sample(self) -> bool:
        """True when a copy of the weights with the adapter in it may sample."""
        return self._on["merge_to_sample"]

    @property
    def samples_in_buckets(self) -> bool:
        """True when prompts may share their beginning, and sequences are not padded, while sampling."""
        return self._on[_IN_BUCKETS]

    def state_dict(self) -> dict[str, Any]:
        return {"savings": self._on | {"share_prompts": self.shares_prompts}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the run began; runs of older releases began without."""
        began = state.get("savings", {})
        for name, asked in self._asked.items():
            if asked is None:
                self._on[name] = self._on[name] and bool(began.get(name, False))


def not_shared(problem: str) -> ConfigError:
    """Return the error for a shared prompt that would not be exact."""
    return ConfigError(f"share_prompts=True with {problem}. Leave share_prompts unset to share them where it is exact.")


def why_not_shared_by(config: Any, *, dropout: float) -> str | None:
    """Return what in a model's config or an adapter's dropout keeps prompts from being shared exactly, or None."""
    if (problem := why_not_full(config)) is not None:
        return problem
    if dropout or getattr(config.get_text_config(), "attention_dropout", 0.0):
        return "dropout: the completions of a prompt would share its random mask. Set the dropout to 0"
    return None


def _can_skip(trainer: Any) -> bool:
    """Return True when completions of advantage 0 have no gradient, and batches need not be taken whole."""
    whole = trainer.aux_loss_enabled or trainer._is_vlm
    return trainer.args.gradient_without_advantage is None and not whole


def _why_not_shared(trainer: Any) -> str | None:
    """Return why a trainer's forward cannot share prompts exactly, or need not; None if it can."""
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    if trainer._is_vlm or trainer.sharding.in_lockstep:
        return "FSDP, DeepSpeed or a model that takes images: their batches keep the form of TRL's"
    if trainer.aux_loss_enabled:
        return "a load-balancing loss, which counts a prompt once per completion. Set router_aux_loss_coef=0"
    if is_unsloth(trainer.model):
        return "a model loaded by Unsloth, whose attention knows no shared prompts. Set model.engine='hf'"
    if trainer.args.share_prompts is None and trainer.accelerator.device.type != "cpu":
        return "a GPU, where it was not measured"
    dropouts = [module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
    if (problem := why_not_shared_by(model.config, dropout=max(dropouts, default=0.0))) is not None:
        return problem
    if not let_prompts_be_shared(model):
        return f"attn_implementation={model.config._attn_implementation!r}. Load the model with 'sdpa'"
    return None


@torch.no_grad()
def _differs(model: Any) -> str | None:
    """Compare shared and padded rows on a few tokens. Catches models that no config tells apart."""
    ids = torch.arange(1, 15, device=model.device)
    rows = [Row(ids[:12], 4), Row(torch.cat([ids[:8], ids[-3:]]), 3), Row(ids.flip(0), 5)]
    try:
        with evaluating(model), torch.autocast(model.device.type, enabled=False):
            padded, shared = (score(model, packed).logps for packed in (pack(rows, pad_id=0), pack_shared(rows)))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(model).__name__}: its forward takes no shared prompts ({first_line(error)})"
    worst = (torch.cat(padded) - torch.cat(shared)).abs().max().item()
    if worst <= rounding_nats(model):
        return None
    return f"{type(model).__name__}: log-probs differ by {worst:.2g} nats from those of padded rows"
