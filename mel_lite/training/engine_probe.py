"""Does the engine sample from the policy that is trained? The same completions, scored by both.

An engine with kernels of its own differs by rounding; one that lost the adapter, or applies it twice, samples another
policy and its rewards teach the wrong lesson. T tokens of all probed completions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import evaluating
from mel_lite.errors import EngineError
from mel_lite.training.packing import Row, pack, rows_of_batch
from mel_lite.training.scoring import score

COMPLETIONS = 4
"""Completions of a probe, on each process."""
TOKENS = 64
"""Of a completion that is sampled for the probe alone."""
EVERY = 10
"""Steps until a probe is taken again that was too early to see the adapter: it starts as zero and grows slowly."""
HALF = 0.5
"""An adapter share further than this from 1 is nearer to "not applied" (0) or "applied twice" (2)."""
SIGMAS = 4.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the engine's log-probs are from the trainer's, in nats per token."""

    mean: float
    """Of the absolute differences."""
    highest: float
    adapter_share: float
    """How much of the adapter the engine applies: 1 = as the trainer, 0 = not at all, 2 = twice; NaN while it does
    nothing. The slope of (engine - base) over (trainer - base), base being the trainer without the adapter."""
    share_error: float
    """Standard error of that slope; NaN with it."""

    @property
    def share_is_seen(self) -> bool:
        """Whether the adapter already changes log-probs by more than the engine's rounding hides."""
        return SIGMAS * self.share_error < HALF

    @property
    def share_is_wrong(self) -> bool:
        """Whether the adapter is not applied, or applied twice, beyond doubt."""
        return abs(self.adapter_share - 1) > HALF + SIGMAS * self.share_error


def agreement(engine_T: torch.Tensor, trainer_T: torch.Tensor, base_T: torch.Tensor) -> Agreement:
    """Compare log-probs of the same T >= 1 tokens; `base_T` are the trainer's without the adapter."""
    engine_T, trainer_T, base_T = (logp_T.detach().double().cpu() for logp_T in (engine_T, trainer_T, base_T))
    off_T, effect_T = engine_T - trainer_T, trainer_T - base_T
    share = error = math.nan
    if (energy := float(effect_T @ effect_T)) > 0:
        excess = float(off_T @ effect_T) / energy
        rest_T = off_T - excess * effect_T
        share, error = 1 + excess, math.sqrt(float(rest_T @ rest_T) / max(1, len(rest_T) - 1) / energy)
    return Agreement(float(off_T.abs().mean()), float(off_T.abs().max()), share, error)


def verdict(found: Agreement, limit: float, *, engine: str, step: int) -> str | None:
    """Why a run must not go on with this engine, with the likely causes; None where it may."""
    if found.share_is_wrong:
        times = "without the adapter" if found.adapter_share < HALF else f"with {found.adapter_share:.1f} x the adapter"
        return (
            f"Step {step}: engine {engine!r} samples {times} that is being trained (its log-probs show "
            f"{found.adapter_share:.2f} +- {found.share_error:.2f} of its effect). An adapter that is handed over and "
            "merged as well counts twice; one that is not handed over counts not at all. Take --engine hf."
        )
    if found.mean <= limit:
        return None
    return (
        f"Step {step}: the log-probs of engine {engine!r} are {found.mean:.3g} nats per token away from the trainer's "
        f"on average (highest {found.highest:.3g}), above probe_max_diff={limit:g}. Likely causes: the adapter is not "
        "applied, or applied twice; the engine computes in another dtype or quantises otherwise; another base model or "
        "temperature. Take --engine hf, or raise train.probe_max_diff if the difference is wanted."
    )


class Probed:
    """Mixin over a TRL trainer: probes the engine at the start of `train` (hence after a resume), after the first
    update, and then until the adapter has grown enough to be seen. Raises EngineError when engine and trainer disagree.
    """

    args: Any
    accelerator: Any
    model: Any
    state: Any
    engine: Any
    _probed_at: list[int] | None = None
    """Steps of the probes of this `train`; None outside of it."""
    _share_seen: bool = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._probed_at, self._share_seen = [], False
        if self.engine.own_kernels and self._samples_with_engine():
            self._correct_by_importance()
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._probed_at = None

    def _samples_with_engine(self) -> bool:
        return bool(self.rollout_func == self._roll_out)  # type: ignore[attr-defined]

    def _correct_by_importance(self) -> None:
        """Let TRL weigh each token by trainer / engine probability, as it does for a vLLM of its own."""
        self.use_vllm = True
        self.vllm_generation = _HandsOverItself()
        self._last_loaded_step = -1

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self._probe_is_due():
            self._probe(batch)
        return batch

    def _probe_is_due(self) -> bool:
        if self._probed_at is None or self.args.probe_max_diff is None or not self.model.training:
            return False
        if not self._samples_with_engine():
            return False
        step = self.state.global_step
        if len(self._probed_at) < 2:
            return step not in self._probed_at
        return not self._share_seen and step >= self._probed_at[-1] + EVERY

    def _probe(self, batch: Any) -> None:
        step, mine = self.state.global_step, []
        assert self._probed_at is not None
        with self._clock("probe"):  # type: ignore[attr-defined]
            rows, engine_T = self._probe_rows(batch)
            if rows and not engine_T.isnan().any():  # an engine may report no log-probs
                self.engine.sleep()  # scoring needs the memory
                trainer_T = self._scores(rows)
                base_T = self._scores(rows, adapter=False)
                mine = [agreement(engine_T, trainer_T, base_T)]
        everyones = gather_object(mine)  # on every process, also where all completions were masked
        if not everyones:
            return
        self._probed_at.append(step)
        found = max(everyones, key=lambda each: each.mean)
        self._share_seen = found.share_is_seen or not hasattr(self.model, "disable_adapter")
        logged = {"mel/probe_logp_diff": found.mean, "mel/probe_logp_diff_max": found.highest}
        if found.share_is_seen:
            logged["mel/probe_adapter"] = found.adapter_share
        self._log_metrics(logged)  # type: ignore[attr-defined]
        if reason := verdict(found, self.args.probe_max_diff, engine=self.engine.name, step=step):
            raise EngineError(reason)

    def _probe_rows(self, batch: Any) -> tuple[list[Row], torch.Tensor]:
        """Completions with the engine's log-probs: the first rollouts of the batch, or ones sampled for the purpose.

        Rollouts sampled with top_p, top_k, min_p or a repetition penalty report log-probs of the cut distribution,
        which the trainer does not score; then a few short completions are sampled without them.
        """
        temperature = self.temperature  # type: ignore[attr-defined]
        mask_BC = batch["completion_mask"][:COMPLETIONS]
        ids_BP = torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1)[:COMPLETIONS]
        valid_BP = torch.cat((batch["prompt_mask"][:COMPLETIONS], mask_BC), dim=1)
        if self._samples_whole_distribution():
            rows = rows_of_batch(ids_BP, valid_BP, mask_BC.shape[1], temperature=temperature)
            engine_T = batch["sampling_per_token_logps"][:COMPLETIONS][mask_BC.bool()]
            return [row for row in rows if row.scored_tokens], engine_T
        width = batch["prompt_ids"].shape[1]
        prompts = [
            ids[valid.bool()].tolist() for ids, valid in zip(ids_BP[:, :width], valid_BP[:, :width], strict=True)
        ]
        requests = [Request(tuple(ids), seed=self.args.seed + i) for i, ids in enumerate(prompts)]
        done = self.engine.unmetered.generate(requests, Sampling(TOKENS, temperature))
        rows = [
            Row(torch.tensor(r.prompt_ids + c.ids, device=mask_BC.device), len(c.ids), temperature)
            for r, c in zip(requests, done, strict=True)
        ]
        return rows, torch.tensor([value for c in done for value in c.logprobs])

    def _samples_whole_distribution(self) -> bool:
        options = self.top_p, self.top_k or 0, self.min_p or 0.0, self.repetition_penalty  # type: ignore[attr-defined]
        return options == (1.0, 0, 0.0, 1.0)

    def _scores(self, rows: Sequence[Row], *, adapter: bool = True) -> torch.Tensor:
        """The trainer's log-probs of the rows' scored ids, one row after another."""
        pad_id = self._tokenizer.pad_token_id  # type: ignore[attr-defined]
        packed = pack(rows, pad_id=pad_id, max_tokens=max(len(row.ids) for row in rows))
        off = not adapter and hasattr(self.model, "disable_adapter")
        # Evaluation mode outside: leaving `disable_adapter` sets what requires a gradient, not the mode.
        with evaluating(self.model), torch.no_grad(), self.accelerator.autocast():
            with self.model.disable_adapter() if off else nullcontext():
                logps, _ = score(self.model, packed)
        return torch.cat(logps)


class _HandsOverItself:
    """Stands where TRL keeps its vLLM: our engine brings the adapter along with every request."""

    def sync_weights(self) -> None:
        """Nothing to do."""
