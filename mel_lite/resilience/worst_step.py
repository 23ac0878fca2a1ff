"""The worst step first: every prompt, completion and lesson at its longest, before a run spends hours to meet them.

Made-up tokens go through the phases of a step as real ones would, up to the update, which is left out. Nothing of the
run changes: weights, moments, random numbers, counters and metrics are afterwards what they were.
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
from mel_lite.engines.hf import evaluating
from mel_lite.engines.vllm import VLLMEngine, WakeError
from mel_lite.errors import ConfigError
from mel_lite.memory.formulas import GIB
from mel_lite.memory.predict import Phase, predict
from mel_lite.memory.workload import Part, Workload
from mel_lite.resilience.memory_gauge import Gauge
from mel_lite.resilience.state_files import rng_state, set_rng_state
from mel_lite.training.packing import pack
from mel_lite.training.scoring import score
from mel_lite.types import Lesson

MOST_TRIES = 7
"""Halvings before a phase is given up."""
FEW_TOKENS = 16
"""Sampled in the worst step by an engine whose memory does not grow with what it samples."""


class OutOfMemoryIn(Exception):
    """A phase of the worst step ran out of memory."""

    def __init__(self, phase: str) -> None:
        super().__init__(phase)
        self.phase = phase


@dataclass(frozen=True, slots=True)
class PhasePeak:
    """What a phase of the worst step was predicted to take, and took."""

    name: str
    predicted_bytes: int | None
    measured_bytes: int | None
    """None: it ran out of memory."""


def worst_step(
    trainer: Any, load: Workload, gauge: Gauge, *, states_bytes: int = 0, only: Sequence[str] | None = None
) -> dict[str, int]:
    """Measured peak in bytes of every phase but load, optimiser and export, in the order of a step.

    Args:
        trainer: A MELTrainer inside `train`, before its first step.
        load: Lengths and counts of the step; `at_once` sequences of each sampling phase are sampled, one round.
        states_bytes: Of the optimiser's states, held meanwhile where it has none yet.
        only: Names of the phases to go through; None = all there are.
    Raises: OutOfMemoryIn the phase that did.
    """
    peaks: dict[str, int] = {}

    def measured(name: str, phase: Callable[[], None]) -> None:
        if only is not None and name not in only:
            return
        gauge.start()
        with _memory_of(name):
            phase()
        peaks[name] = gauge.peak_bytes()

    trainer.engine.sleep()  # so that waking up has to find its memory beside the optimiser's states
    held = 0 if trainer.optimizer is not None and trainer.optimizer.state else states_bytes
    with _memory_of("optimiser"):
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
    """Put back what the phases note on the way."""
    names = ("_metrics", "_trained", "_micro_batches", "_lesson_weight", "_riding", "_ridden_logps", "_under_way")
    noted = {name: getattr(trainer, name) for name in names}
    clock, engine = trainer._clock, trainer.engine
    times, tokens, total = clock.seconds_s.copy(), clock.generated_tokens, engine.total_generated_tokens
    rng, training = rng_state(all_gpus=trainer.args.world_size > 1), trainer.model.training
    steps = trainer.__dict__.get("current_gradient_accumulation_steps")
    grads = [(p, p.grad) for p in trainer.model.parameters()]
    for p, _ in grads:
        p.grad = None
    trainer._metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    trainer._trained, trainer._micro_batches = [], None
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    try:
        yield
    finally:
        for name, value in noted.items():
            setattr(trainer, name, value)
        if steps is None:
            del trainer.current_gradient_accumulation_steps
        else:
            trainer.current_gradient_accumulation_steps = steps
        trainer.__dict__.pop("_measures_gradients", None)
        trainer._meter.give_up()
        trainer._meter.drain(lambda tensor: tensor)
        clock.seconds_s, clock.generated_tokens, engine.total_generated_tokens = times, tokens, total
        for p, grad in grads:
            p.grad = grad
        trainer.model.train(training)
        set_rng_state(rng)


def _ids(trainer: Any, tokens: int, start: int = 0) -> list[int]:
    """Ids of ordinary tokens; which ones is without effect on memory."""
    vocabulary = trainer.model.config.get_text_config().vocab_size
    return [(7 * (start + i) + 11) % vocabulary for i in range(tokens)]


def _sample(trainer: Any, load: Workload, name: str) -> None:
    sequences, _, new_tokens = load.sampled[name]
    if load.vllm is None:
        sample_at_full_length(trainer, load, name, new_tokens)
    else:  # its cache has its size from the start, so a few tokens of all sequences show as much as many
        sample_at_full_length(trainer, load, name, min(new_tokens, FEW_TOKENS), sequences=sequences)


def sample_at_full_length(
    trainer: Any, load: Workload, name: str, new_tokens: int, *, sequences: int | None = None
) -> None:
    """Sample after the longest prompts of a phase, past the end of every sequence; `sequences` None = as many as are
    sampled at once."""
    _, prompt_tokens, _ = load.sampled[name]
    count = sequences or load.at_once(name)
    requests = [Request(tuple(_ids(trainer, prompt_tokens, i)), i) for i in range(count)]
    trainer.engine.wake()
    trainer.engine.generate(requests, Sampling(new_tokens, trainer.temperature, ignore_eos=True))


def _score(trainer: Any, load: Workload) -> None:
    """Passes without gradient, as `_after_step` and TRL make them."""
    with evaluating(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        if load.pairs:
            rows = [trainer._lesson_row(_lesson(trainer, load.lesson_tokens, load.analysis_tokens))] * load.pairs
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
    trainer._lesson_weight = trainer.args.mel_weight
    every = bool(trainer.args.grad_norm_every)
    trainer._measures_gradients = lambda: every and torch.is_grad_enabled()
    for part in load.fullest_parts:
        loss = trainer.compute_loss(trainer.model_wrapped, _micro_batch(trainer, part))
        trainer.accelerator.backward(loss)


def _micro_batch(trainer: Any, part: Part) -> dict[str, Any]:
    """A TRL micro-batch of these rows, as `_generate_and_score_completions` hands them on."""
    device = trainer.accelerator.device
    rollouts = part.rollouts or ((2, 1),)  # TRL's loss wants one
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
        "lessons": tuple(_lesson(trainer, *lesson) for lesson in part.lessons),
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
    """The load with the share and the sequences that vLLM was really started with; as it is for other engines."""
    if load.vllm is None or not isinstance(engine, VLLMEngine):
        return load
    sequences = engine.max_num_seqs or load.vllm.sequences
    share = replace(load.vllm, utilization=engine.share or load.vllm.utilization, sequences=sequences)
    return replace(load, vllm=share)


# ---- what follows from it --------------------------------------------------------------------------------------------


class WorstStepFirst(TrainerCallback):
    """Takes the worst step before a run's first, and settles on what fits.

    Where a phase passes the budget, fewer tokens go through at once or fewer sequences are sampled, and it is measured
    again. Raises ConfigError, from `train`, where that does not help.
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
        """Of the load as it is now; empty where nothing is compared."""
        self._report, self._budget_bytes = report, budget_bytes

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        states = self._predicted["update"].parts["optimiser states"] if "update" in self._predicted else 0
        for _attempt in range(MOST_TRIES):
            over = self._attempt(states)
            if not over:
                return
        raise ConfigError(self._refusal(over[0].name, over[0].measured_bytes))

    def _attempt(self, states_bytes: int) -> list[PhasePeak]:
        """Take the step, report it, and halve what was too much, which is returned. Raises ConfigError."""
        try:
            measured = worst_step(self._trainer, self._load, self._gauge, states_bytes=states_bytes)
        except OutOfMemoryIn as error:
            found = PhasePeak(error.phase, self._predicted_bytes(error.phase), None)
            if found.name == "optimiser":  # nothing that is done less of at once would help
                raise ConfigError(self._refusal(found.name, None)) from error
            self._report((found,), self._adapt([found]))
            return [found]
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        peaks = tuple(PhasePeak(name, self._predicted_bytes(name), found) for name, found in measured.items())
        if self._trainer.budget_tokens is not None:  # as it is after an update that ran out of memory
            self._asks(max_micro_batch_tokens=self._trainer.budget_tokens)
        most = self._budget_bytes
        over = [peak for peak in peaks if most is not None and (peak.measured_bytes or 0) > most]
        self._report(peaks, self._adapt(over) if over else "")
        return over

    def _asks(self, **changes: Any) -> None:
        """Change the load, and what is predicted for it."""
        self._load = replace(self._load, **changes)
        if self._predicted:
            self._predicted = {phase.name: phase for phase in predict(self._load)}

    def _predicted_bytes(self, name: str) -> int | None:
        return self._predicted[name].bytes if name in self._predicted else None

    def _adapt(self, over: Sequence[PhasePeak]) -> str:
        """Halve what the phases over the budget do at once; returns the options for it. Raises ConfigError."""
        changes: dict[str, Any] = {}
        for peak in over:
            if peak.name in self._load.sampled:
                tokens = self._sample_less(peak)
                changes["max_cache_tokens"] = min(tokens, changes.get("max_cache_tokens", tokens))
            elif "max_micro_batch_tokens" not in changes:  # once for scoring and update together
                changes["max_micro_batch_tokens"] = self._train_less(peak)
        self._asks(**changes)
        return " ".join(f"--set train.{key}={tokens}" for key, tokens in changes.items())

    def _train_less(self, peak: PhasePeak) -> int:
        """Half of the tokens that go through the model at once."""
        load = self._load
        longest = max(load.rollout_tokens, load.lesson_tokens if load.pairs else 0)
        if not self._trainer.halve_budget(most=load.micro_batch_tokens, least=longest):
            raise ConfigError(self._refusal(peak.name, peak.measured_bytes))
        return int(self._trainer.budget_tokens)

    def _sample_less(self, peak: PhasePeak) -> int:
        """Tokens of half of the sequences that the phase samples at once."""
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
        if name == "optimiser":
            return (
                f"The optimiser's states do not fit{budget}. Set train.optim=paged_adamw_8bit, lower lora.r, set "
                "model.load_in_4bit=true where it is off, or take a smaller model. (--no-worst-case trains without "
                "this check.)"
            )
        knob = "train.max_context_tokens" if name in ("analysis", "update") else "train.max_completion_length"
        return (
            f"The worst step's {name} {took}{budget}, with one row at a time. Lower {knob}, take a smaller model, or "
            "set train.gradient_checkpointing=true and model.load_in_4bit=true where they are off. "
            "(--no-worst-case trains without this check.)"
        )

    def _smaller_share(self, measured_bytes: int | None) -> str:
        """What to do where vLLM takes too much: its share cannot be changed once it runs."""
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
                "train.max_completion_length and train.max_context_tokens, take a smaller model"
            )
        return (
            f"{how} (now {share:.2f}), or sample with transformers: --engine hf. (--no-worst-case trains without this "
            "check.)"
        )
