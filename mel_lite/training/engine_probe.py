"""Check that the engine samples from the policy being trained: engine and trainer score the same completions.

An engine with its own kernels differs by rounding. One that lost the adapter, or applies it twice, samples from another
policy, and its rewards train the wrong thing. T tokens of all probed completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from mel_lite.engines.base import Request, Sampling
from mel_lite.errors import EngineError
from mel_lite.training.batches.packing import Row, rows_of_batch

COMPLETIONS = 4
"""Completions of a probe, on each rank."""
TOKENS = 64
"""Length of a completion that is sampled for the probe alone."""
EVERY = 10
"""Steps until the probe is repeated while the adapter is too small to be seen: it starts at zero and grows slowly."""
HALF = 0.5
"""An adapter share further than this from 1 is closer to "not applied" (0) or "applied twice" (2)."""
SIGMAS = 4.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """Distance between the engine's and the trainer's log-probs, in nats per token."""

    mean: float
    """Mean of the absolute differences."""
    highest: float
    adapter_share: float
    """Share of the adapter that the engine applies: 1 = like the trainer, 0 = not at all, 2 = twice; NaN while the
    adapter has no effect. It is the slope of (engine - base) over (trainer - base), where base is the trainer without
    the adapter."""
    share_error: float
    """Standard error of that slope; NaN where the slope is."""

    @property
    def share_is_seen(self) -> bool:
        """True when the adapter's effect on log-probs exceeds the engine's rounding."""
        return SIGMAS * self.share_error < HALF

    @property
    def share_is_wrong(self) -> bool:
        """True when the adapter is certainly not applied, or applied twice."""
        return abs(self.adapter_share - 1) > HALF + SIGMAS * self.share_error


def agreement(engine_T: torch.Tensor, trainer_T: torch.Tensor, base_T: torch.Tensor) -> Agreement:
    """Compare log-probs of the same T >= 1 tokens; `base_T` holds the trainer's without the adapter."""
    engine_T, trainer_T, base_T = (logp_T.detach().double().cpu() for logp_T in (engine_T, trainer_T, base_T))
    off_T, effect_T = engine_T - trainer_T, trainer_T - base_T
    share = error = math.nan
    if (energy := float(effect_T @ effect_T)) > 0:
        excess = float(off_T @ effect_T) / energy
        rest_T = off_T - excess * effect_T
        share, error = 1 + excess, math.sqrt(float(rest_T @ rest_T) / max(1, len(rest_T) - 1) / energy)
    return Agreement(float(off_T.abs().mean()), float(off_T.abs().max()), share, error)


def verdict(found: Agreement, limit: float, *, engine: str, step: int) -> str | None:
    """Return why the run must stop with this engine, with the likely causes; None when it may continue."""
    if found.share_is_wrong:
        times = "without the adapter" if found.adapter_share < HALF else f"with {found.adapter_share:.1f} x the adapter"
        return (
            f"Step {step}: engine {engine!r} samples {times} that is being trained (its log-probs show "
            f"{found.adapter_share:.2f} +- {found.share_error:.2f} of its effect). An adapter that is both passed to "
            "the engine and merged counts twice; one that is not passed has no effect. Use --engine hf."
        )
    if found.mean <= limit:
        return None
    return (
        f"Step {step}: the log-probs of engine {engine!r} are {found.mean:.3g} nats per token away from the trainer's "
        f"on average (highest {found.highest:.3g}), above probe_max_diff={limit:g}. Likely causes: the adapter is not "
        "applied, or applied twice; the engine uses another dtype or quantization; another base model or temperature. "
        "Use --engine hf, or raise train.probe_max_diff if the difference is intended."
    )


class EngineProbe:
    """Probe the engine at the start of `train` (so also after a resume), after the first update, and then until the
    adapter is large enough to be seen. It observes only: the loss does not depend on it.

    Args:
        trainer: A MELTrainer; its rollouts must come from `trainer.engine`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._steps: list[int] = []
        """Steps of the probes of this `train`."""
        self._share_seen = False

    def reset(self) -> None:
        """Start over, at the beginning of `train`."""
        self._steps, self._share_seen = [], False

    def check(self, batch: Any) -> None:
        """Probe if it is due, on the rollouts of TRL's batch. Raises: EngineError when engine and trainer disagree."""
        if not self._is_due():
            return
        trainer = self._trainer
        step, local = trainer.state.global_step, []
        with trainer.clock("probe"):
            rows, engine_T = self._rows(batch)
            if rows and not engine_T.isnan().any():  # an engine may report no log-probs
                trainer.engine.sleep()  # scoring needs the memory
                trainer_T = self._scores(rows)
                base_T = self._scores(rows, adapter=False)
                local = [agreement(engine_T, trainer_T, base_T)]
        found = max(gather_object(local), key=lambda each: each.mean, default=None)
        if found is None:  # every completion was masked, on every rank
            return
        self._steps.append(step)
        self._share_seen = found.share_is_seen or not hasattr(trainer.model, "disable_adapter")
        logged = {"mel/probe_logp_diff": found.mean, "mel/probe_logp_diff_max": found.highest}
        if found.share_is_seen:
            logged["mel/probe_adapter"] = found.adapter_share
        trainer.add_metrics(logged)
        if reason := verdict(found, trainer.args.probe_max_diff, engine=trainer.engine.name, step=step):
            raise EngineError(reason)

    def _is_due(self) -> bool:
        trainer = self._trainer
        if trainer.args.probe_max_diff is None or not (trainer.is_in_train and trainer.model.training):
            return False
        step = trainer.state.global_step
        if len(self._steps) < 2:
            return step not in self._steps
        return not self._share_seen and step >= self._steps[-1] + EVERY

    def _rows(self, batch: Any) -> tuple[list[Row], torch.Tensor]:
        """Return completions and the engine's log-probs: the batch's first rollouts, or ones sampled for the probe.

        Rollouts sampled with top_p, top_k, min_p or a repetition penalty report log-probs of the cut distribution,
        which the trainer does not score. Then a few short completions are sampled without these.
        """
        trainer = self._trainer
        temperature = trainer.temperature
        mask_BC = batch["completion_mask"][:COMPLETIONS]
        ids_BP = torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1)[:COMPLETIONS]
        valid_BP = torch.cat((batch["prompt_mask"][:COMPLETIONS], mask_BC), dim=1)
        if not trainer.cut_mass.options:
            rows = rows_of_batch(ids_BP, valid_BP, mask_BC.shape[1], temperature=temperature)
            engine_T = batch["sampling_per_token_logps"][:COMPLETIONS][mask_BC.bool()]
            return [row for row in rows if row.scored_tokens], engine_T
        width = batch["prompt_ids"].shape[1]
        prompts = [
            ids[valid.bool()].tolist() for ids, valid in zip(ids_BP[:, :width], valid_BP[:, :width], strict=True)
        ]
        requests = [Request(tuple(ids), seed=trainer.args.seed + i) for i, ids in enumerate(prompts)]
        done = trainer.engine.unmetered.generate(requests, Sampling(TOKENS, temperature))
        rows = [
            Row(torch.tensor(r.prompt_ids + c.ids, device=mask_BC.device), len(c.ids), temperature)
            for r, c in zip(requests, done, strict=True)
        ]
        return rows, torch.tensor([value for c in done for value in c.logprobs])

    def _scores(self, rows: Sequence[Row], *, adapter: bool = True) -> torch.Tensor:
        """Return the trainer's log-probs of the rows' scored ids, one row after another."""
        return torch.cat(self._trainer.scorer.rows(rows, adapter=adapter))
