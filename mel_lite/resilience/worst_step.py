"""Run the worst step first: every prompt, completion and lesson at full length, before hours are spent.

Made-up tokens go through the phases of a step like real ones, up to the update, which is left out. Nothing of the run
changes: weights, moments, random numbers, counters and metrics are restored afterwards.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.vllm import WakeError
from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise import LessonShare
from mel_lite.memory.formulas import GIB
from mel_lite.memory.predict import Phase, predict
from mel_lite.memory.workload import Part, Workload
from mel_lite.models.modes import evaluating
from mel_lite.resilience.memory_gauge import Gauge
from mel_lite.resilience.state_files import rng_state, set_rng_state
from mel_lite.training.batches.packing import lesson_row, pack
from mel_lite.training.scoring import score
from mel_lite.types import Lesson

MAX_TRIES = 7
"""Halvings before a phase is given up."""
FEW_TOKENS = 16
"""Tokens sampled in the worst step by an engine whose memory does not grow with what it samples."""


class OutOfMemoryIn(Exception):
    """A phase of the worst step ran out of memory."""

    def __init__(self, phase: str) -> None:
        super().__init__(phase)
        self.phase = phase


@dataclass(frozen=True, slots=True)
class PhasePeak:
    """Predicted and measured peak memory of one phase of the worst step."""

    name: str
    predicted_bytes: int | None
    measured_bytes: int | None
    """None: it ran out of memory."""


def worst_step(
    trainer: Any, load: Workload, gauge: Gauge, *, states_bytes: int = 0, only: Sequence[str] | None = None
) -> dict[str, int]:
    """Return the measured peak in bytes of every phase but load, optimizer and export, in the order of a step.

    Args:
        trainer: A MELTrainer inside `train`, before its first step.
        load: Lengths and counts of the step; `at_once` sequences of each sampling phase are sampled, one round.
        states_bytes: Size of the optimizer's states, allocated meanwhile if it has none yet.
        only: Names of the phases to run; None = all.
    Raises: OutOfMemoryIn the phase that ran out.
    """
    peaks: dict[str, int] = {}

    def measured(name: str, phase: Callable[[], None]) -> None:
        if only is not None and name not in only:
            return
        gauge.start()
        with _memory_of(name):
            phase()
        peaks[name] = gauge.peak_bytes()

    trainer.engine.sleep()  # so that the engine wakes with the optimizer states allocated
    held = 0 if trainer.optimizer is not None and trainer.optimizer.state else states_bytes
    with _memory_of("optimizer"):
        states = torch.empty(held, dtype=torch.uint8, device=trainer.accelerator.device)
    with _as_it_was(trainer):
        for name in load.sampled:
            measured(name, lambda name=name: _sample(trainer, load, name))  # type: ignore[misc]
        trainer.engine.sleep()
        if load.pairs or load.scores_rollouts:
            measured("scoring", lambda: _score(trainer, load))
        measured("update", lambda: _update(trainer, load))
    del states
    return peaks


@contextmanager
def _memory_of(phase: str) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, WakeError) as error:
        raise OutOfMemoryIn(phase) from error


@contextmanager
def _as_it_was(trainer: Any) -> Iterator[None]:
    """Restore what the phases change."""
    metrics, lessons, every = trainer._metrics, trainer.trained_lessons, trainer.gradient_meter.every
    clock, engine = trainer.clock, trainer.engine
    times, tokens, total = clock.seconds_s.copy(), clock.generated_tokens, engine.total_generated_tokens
    of_lessons, shared_s = clock.lesson_tokens, clock.shared_s
    rng, training = rng_state(all_gpus=trainer.args.world_size > 1), trainer.model.training
    steps = trainer.__dict__.get("current_gradient_accumulation_steps")
    grads = [(p, p.grad) for p in trainer.model.parameters()]
    for p, _ in grads:
        p.grad = None
    trainer._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    trainer.trained_lessons = []
    trainer.gradient_meter.every = min(every, 1)  # as on a step that measures
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    try:
        yield
    finally:
        trainer._metrics, trainer.trained_lessons = metrics, lessons
        if steps is None:
            del trainer.current_gradient_accumulation_steps
        else:
            trainer.current_gradient_accumulation_steps = steps
        trainer.gradient_meter.every = every
        trainer.gradient_meter.give_up()
        trainer.gradient_meter.drain(lambda tensor: tensor)
        clock.seconds_s, clock.generated_tokens, engine.total_generated_tokens = times, tokens, total
        clock.lesson_tokens, clock.shared_s = of_lessons, shared_s
        for p, grad in grads:
            p.grad = grad
        trainer.model.train(training)
        set_rng_state(rng)


def _ids(trainer: Any, tokens: int, start: int = 0) -> list[int]:
    """Return ids of ordinary tokens; memory does not depend on which ones."""
    vocabulary = trainer.model.config.get_text_config().vocab_size
    return [(7 * (start + i) + 11) % vocabulary for i in range(tokens)]


def _sample(trainer: Any, load: Workload, name: str) -> None:
    sequences, _, new_tokens = load.sampled[name]
    if load.vllm is None:
        sample_at_full_length(trainer, load, name, new_tokens)
    else:  # its cache has a fixed size, so a few tokens of all sequences suffice
        sample_at_full_length(trainer, load, name, min(new_tokens, FEW_TOKENS), sequences=sequences)


def sample_at_full_length(
    trainer: Any, load: Workload, name: str, new_tokens: int, *, sequences: int | None = None
) -> None:
    """Sample past the end of every sequence after the longest prompts of a phase; `sequences` None = one full round."""
    _, prompt_tokens, _ = load.sampled[name]
    count = sequences or load.at_once(name)
    requests = [Request(tuple(_ids(trainer, prompt_tokens, i)), i) for i in range(count)]
    trainer.engine.wake()
    trainer.engine.generate(requests, Sampling(new_tokens, trainer.temperature, ignore_eos=True))


def _score(trainer: Any, load: Workload) -> None:
    """Run the passes without gradient that `around_update` and TRL run."""
    with evaluating(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        if load.pairs:
            lesson = _lesson(trainer, load.lesson_tokens, load.analysis_tokens)
            rows = [lesson_row(lesson, trainer.accelerator.device)] * load.pairs
            score(trainer.model, pack(rows, pad_id=0, max_tokens=load.lesson_tokens))
        if load.scores_rollouts:
            whole = Part(((load.rollout_tokens, load.completion_tokens),) * load.micro_batch)
            batch = _micro_batch(trainer, whole)
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            width = batch["completion_ids"].shape[1]
            trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), width, load.micro_batch
            )


def _update(trainer: Any, load: Workload) -> None:
    trainer.model.train()
    for part in load.fullest_parts:
        loss = trainer.compute_loss(trainer.model_wrapped, _micro_batch(trainer, part))
        trainer.accelerator.backward(loss)


def _micro_batch(trainer: Any, part: Part) -> dict[str, Any]:
    """Return a TRL micro-batch of these rows, like the ones `_prepare_inputs` returns."""
    device = trainer.accelerator.device
    rollouts = part.rollouts or ((2, 1),)  # TRL's loss needs one
    width, completion = max(t - s for t, s in rollouts), max(s for _, s in rollouts)
    size = (len(rollouts), completion)
    prompt_mask = torch.zeros(len(rollouts), width, dtype=torch.long, device=device)
    mask = torch.zeros(size, dtype=torch.long, device=device)
    for b, (tokens, scored) in enumerate(rollouts):
        prompt_mask[b, width - (tokens - scored) :] = 1
        mask[b, :scored] = 1
    some = torch.tensor(_ids(trainer, width + completion), device=device).expand(len(rollouts), -1)
    batch = {
        "prompt_ids": some[:, :width] * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": some[:, width:] * mask,
        "completion_mask": mask,
        "advantages": torch.ones(len(rollouts), device=device),
        "num_items_in_batch": mask.sum(),
        "lessons": LessonShare(tuple(_lesson(trainer, *each) for each in part.lessons), trainer.args.mel_weight),
    }
    if trainer.beta:
        batch["ref_per_token_logps"] = torch.full(size, -1.0, device=device)
    if trainer.use_vllm:
        batch["importance_sampling_ratio"] = torch.ones(size, device=device)
    return batch


def _lesson(trainer: Any, tokens: int, scored_tokens: int) -> Lesson:
    ids = tuple(_ids(trainer, tokens))
    return Lesson(0, ids[:-scored_tokens], ids[-scored_tokens:])


def as_started(load: Workload, engine: Any) -> Workload:
    """Return the load with the share and sequences vLLM was actually started with; unchanged for other engines."""
    if load.vllm is None:
        return load
    sequences = engine.max_num_seqs or load.vllm.sequences
    share = replace(load.vllm, utilization=engine.share or load.vllm.utilization, sequences=sequences)
    return replace(load, vllm=share)


# ---- acting on it --------------------------------------------------------------------------------------------


class WorstStepFirst(TrainerCallback):
    """Run the worst step before a run's first, and reduce what does not fit.

    When a phase exceeds the budget, fewer tokens are processed at once or fewer sequences are sampled, and it is
    measured again. Raises ConfigError, from `train`, when that does not help.
    """

    def __init__(
        self,
        trainer: Any,
        load: Workload,
        predicted: Sequence[Phase],
        report: Callable[[tuple[PhasePeak, ...], str], None],
        *,
        gauge: Gauge,
        budget_bytes: int | None,
    ) -> None:
        self._trainer, self._load, self._gauge = trainer, load, gauge
        self._predicted = {phase.name: phase for phase in predicted}
        """Predictions for the current load; empty when nothing is compared."""
        self._report, self._budget_bytes = report, budget_bytes

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        states = self._predicted["update"].parts["optimizer states"] if "update" in self._predicted else 0
        for _attempt in range(MAX_TRIES):
            over = self._attempt(states)
            if not over:
                return
        raise ConfigError(self._refusal(over[0].name, over[0].measured_bytes))

    def _attempt(self, states_bytes: int) -> list[PhasePeak]:
        """Run the step, report it, and halve and return the phases that were too large. Raises ConfigError."""
        try:
            measured = worst_step(self._trainer, self._load, self._gauge, states_bytes=states_bytes)
        except OutOfMemoryIn as error:
            found = PhasePeak(error.phase, self._predicted_bytes(error.phase), None)
            if found.name == "optimizer":  # smaller parts would not help
                raise ConfigError(self._refusal(found.name, None)) from error
            self._report((found,), self._adapt([found]))
            return [found]
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        peaks = tuple(PhasePeak(name, self._predicted_bytes(name), found) for name, found in measured.items())
        if self._trainer.budget_tokens is not None:  # lowered by an update that ran out of memory
            self._change(max_micro_batch_tokens=self._trainer.budget_tokens)
        most = self._budget_bytes
        over = [peak for peak in peaks if most is not None and (peak.measured_bytes or 0) > most]
        self._report(peaks, self._adapt(over) if over else "")
        return over

    def _change(self, **changes: Any) -> None:
        """Change the load and its predictions."""
        self._load = replace(self._load, **changes)
        if self._predicted:
            self._predicted = {phase.name: phase for phase in predict(self._load)}

    def _predicted_bytes(self, name: str) -> int | None:
        return self._predicted[name].bytes if name in self._predicted else None

    def _adapt(self, over: Sequence[PhasePeak]) -> str:
        """Halve what the phases over the budget process at once; return the options for it. Raises ConfigError."""
        changes: dict[str, Any] = {}
        for peak in over:
            if peak.name in self._load.sampled:
                tokens = self._sample_less(peak)
                changes["max_cache_tokens"] = min(tokens, changes.get("max_cache_tokens", tokens))
            elif "max_micro_batch_tokens" not in changes:  # once for scoring and update together
                changes["max_micro_batch_tokens"] = self._train_less(peak)
        self._change(**changes)
        return " ".join(f"--set train.{key}={tokens}" for key, tokens in changes.items())

    def _train_less(self, peak: PhasePeak) -> int:
        """Halve the tokens that go through the model at once, and return them."""
        load = self._load
        longest = max(load.rollout_tokens, load.lesson_tokens if load.pairs else 0)
        if not self._trainer.halve_budget(most=load.micro_batch_tokens, least=longest):
            raise ConfigError(self._refusal(peak.name, peak.measured_bytes))
        return int(self._trainer.budget_tokens)

    def _sample_less(self, peak: PhasePeak) -> int:
        """Halve the sequences that the phase samples at once, and return their tokens."""
        load = self._load
        sequences, (_, prompt, new) = load.at_once(peak.name) // 2, load.sampled[peak.name]
        tokens = min(load.max_cache_tokens or sequences * (prompt + new), sequences * (prompt + new))
        if load.vllm is not None or sequences < 1 or not self._trainer.engine.limit_cache(tokens):
            raise ConfigError(self._refusal(peak.name, peak.measured_bytes))
        return tokens

    def _refusal(self, name: str, measured_bytes: int | None) -> str:
        took = "runs out of memory" if measured_bytes is None else f"takes {measured_bytes / GIB:.1f} GiB"
        budget = "" if self._budget_bytes is None else f" of the {self._budget_bytes / GIB:.1f} GiB there are"
        if self._load.vllm is not None and name in self._load.sampled:
            return f"The worst step's {name} {took}{budget}. {self._smaller_share(measured_bytes)}"
        if name == "optimizer":
            return (
                f"The optimizer's states do not fit{budget}. Set train.optim=paged_adamw_8bit, lower lora.r, set "
                "model.load_in_4bit=true if it is off, or use a smaller model. (--no-worst-case trains without "
                "this check.)"
            )
        knob = "train.max_context_tokens" if name in ("analysis", "update") else "train.max_completion_length"
        return (
            f"The worst step's {name} {took}{budget}, with one row at a time. Lower {knob}, use a smaller model, or "
            "set train.gradient_checkpointing=true and model.load_in_4bit=true if they are off. "
            "(--no-worst-case trains without this check.)"
        )

    def _smaller_share(self, measured_bytes: int | None) -> str:
        """Return the fix when vLLM takes too much; its share cannot be changed once it runs."""
        assert self._load.vllm is not None
        card_bytes = self._load.vllm.card.total_bytes
        share = self._load.share_bytes / card_bytes
        over = share / 10
        if measured_bytes is not None and self._budget_bytes is not None:
            over = (measured_bytes - self._budget_bytes) / card_bytes
        smaller, least = math.floor(100 * (share - over)) / 100, self._load.share_of(0) / card_bytes
        how = f"Start again with a smaller share for vLLM, --set model.gpu_memory_utilization={smaller:.2f}"
        if smaller < least:
            how = (
                f"No smaller share serves sequences of {self._load.vllm_context_tokens} tokens: lower "
                "train.max_completion_length and train.max_context_tokens, use a smaller model"
            )
        return (
            f"{how} (now {share:.2f}), or sample with transformers: --engine hf. (--no-worst-case trains without this "
            "check.)"
        )
