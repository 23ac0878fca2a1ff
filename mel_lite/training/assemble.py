"""What `MELTrainer` is put together from: argument checks, judge, engine, desk, and the small watchers of a run."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from trl.models import unwrap_model_for_generation

from mel_lite.config import MELConfig
from mel_lite.data.tasks import ANSWER_COLUMNS
from mel_lite.engines.base import Engine, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.engines.unsloth import is_unsloth, unsloth_engine
from mel_lite.errors import ConfigError, DataError, ModelError
from mel_lite.lessons.pipeline import Desk, StudyOptions
from mel_lite.lessons.prompts import load_templates
from mel_lite.models.load import context_length, keep_four_bit_layout
from mel_lite.training.metrics import PhaseClock
from mel_lite.types import Group
from mel_lite.verify.judge import AnswerJudge, Judge, RewardJudge, answer_column
from mel_lite.verify.pool import VerifyPool
from mel_lite.verify.verifiers import get_verifier

logger = logging.getLogger(__name__)

MIN_CONTEXT_TOKENS = 256
"""Less than this cannot hold the instruction and two solutions."""


def default_args(model: Any) -> MELConfig:
    """TRL's default output folder with our suffix, for a trainer built without `args`."""
    name = model if isinstance(model, str) else model.config._name_or_path
    return MELConfig(f"{name.split('/')[-1]}-MEL")


def check_arguments(args: Any, train_dataset: Any, *, multi_turn: bool) -> None:
    """Refuse what would fail or mislead later. Raises ConfigError or DataError."""
    if not isinstance(args, MELConfig):
        raise ConfigError(
            f"args is a {type(args).__name__}, but MELTrainer needs a MELConfig: it has every GRPOConfig option. "
            "Replace GRPOConfig(...) by MELConfig(...)."
        )
    if train_dataset is not None and hasattr(train_dataset, "__len__") and len(train_dataset) == 0:
        raise DataError("train_dataset is empty: there is nothing to train on. Check the file, split and filters.")
    if args.with_meta_experience and multi_turn:
        raise ConfigError(
            "tools or environment_factory with meta-experience: analyses of multi-turn rollouts are not supported. "
            "Set algorithm='grpo', or train without tools."
        )
    if args.grad_norm_every and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ConfigError(
            "grad_norm_every with gradient_checkpointing_kwargs={'use_reentrant': True}: reentrant checkpointing "
            "cannot take the gradient of one loss term. Set use_reentrant to False, or grad_norm_every=0."
        )
    rounds = args.steps_per_generation * args.num_iterations
    saved_every = args.save_steps * args.gradient_accumulation_steps
    if args.save_strategy == "steps" and args.save_steps >= 1 and saved_every % rounds:
        logger.warning(
            "save_steps=%s falls inside a generation batch (%s accumulation steps): resuming from such a checkpoint "
            "samples that batch anew. For exact resume make save_steps a multiple of %s.",
            args.save_steps,
            rounds,
            rounds // math.gcd(rounds, args.gradient_accumulation_steps),
        )


_TRLS_GENERATION = ("use_vllm", "use_transformers_continuous_batching", "generation_kwargs", "cache_implementation")
"""Options of TRL's own generation, which an engine of ours does not follow."""


def engine_generates(args: MELConfig, tools: Any, environment_factory: Any) -> bool:
    """Whether rollouts come from our engine; without meta-experience, TRL's own generation serves its own options.

    Raises: ConfigError when an option of TRL's generation is set and meta-experience needs our engine.
    """
    theirs = [name for name in _TRLS_GENERATION if getattr(args, name)]
    if theirs and args.with_meta_experience:
        raise ConfigError(
            f"{theirs[0]}={getattr(args, theirs[0])!r} with meta-experience: rollouts, analyses and replays must come "
            f"from one engine, which does not follow that option. Unset {theirs[0]}, or set algorithm='grpo'."
        )
    return not (theirs or tools or environment_factory)


def check_support(trainer: Any) -> None:
    """Refuse models and set-ups on which lessons could not be trained. Raises ConfigError or ModelError."""
    in_parts = {name: getattr(trainer.args, name) for name in ("max_micro_batch_tokens", "skip_zero_advantage")}
    if wanted := [f"{name}={value}" for name, value in in_parts.items() if value]:
        sharded = trainer.is_fsdp_enabled or trainer.args.deepspeed_plugin is not None
        if sharded or trainer._is_vlm or trainer.aux_loss_enabled:
            raise ConfigError(
                f"{wanted[0]} with FSDP, DeepSpeed, a model that takes images or a load-balancing "
                "loss: their batches cannot be taken in parts. Unset it, and lower per_device_train_batch_size instead."
            )
    if trainer._is_vlm:
        if trainer.args.with_meta_experience:
            raise ModelError("Meta-experience is text-only; this model takes images. Set algorithm='grpo'.")
        trainer.rollout_func = None  # only TRL's own generation hands the images over
    if not trainer.args.with_meta_experience:
        return
    if trainer.aux_loss_enabled:
        raise ConfigError(
            f"router_aux_loss_coef={trainer.router_aux_loss_coef} with meta-experience: lessons do not pass through "
            "the load-balancing loss. Set router_aux_loss_coef=0, or algorithm='grpo'."
        )
    plugin = trainer.args.deepspeed_plugin
    if trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
        raise ConfigError(
            "FSDP or ZeRO-3 with meta-experience: ranks write different numbers of lessons, and sharded weights can "
            "only be used by all ranks at once. Use DDP or ZeRO-2, or set algorithm='grpo'."
        )


def settle_weights(trainer: Any) -> None:
    """Leave the weights as training needs them: 4-bit layers in their portable layout, trained ones fit for fp16.

    TRL keeps the adapter of a 4-bit base in bfloat16, on which the gradient scaler of fp16 training fails.
    """
    keep_four_bit_layout(trainer.model)
    if trainer.args.fp16:
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()


def build_judge(
    args: MELConfig, train_dataset: Any, rewards_of: Callable[[Sequence[Group], Sequence[str]], list[float]]
) -> tuple[Judge, str | None]:
    """The judge of completions and the answer column it reads (None when rewards are the judge).

    Raises: DataError when `verifier` is set and the dataset has no answer; VerifierError for an unknown verifier.
    """
    columns = list(getattr(train_dataset, "column_names", None) or next(iter(train_dataset or []), {}))
    column = answer_column(columns)
    if args.verifier is None and column is None:
        if args.world_size > 1 and args.with_meta_experience:
            raise ConfigError(
                "verifier=None on several processes: replays would be judged by reward functions, whose results TRL "
                f"gathers in lockstep. Set verifier, and name the answer's column one of {', '.join(ANSWER_COLUMNS)}."
            )
        return RewardJudge(rewards_of, args.verifier_threshold), None
    if column is None:
        raise DataError(
            f"verifier={args.verifier!r} needs a reference answer, but the dataset has only the columns "
            f"{', '.join(columns) or 'none'}. Rename the answer's column to one of {', '.join(ANSWER_COLUMNS)}, or "
            "leave verifier unset to judge by reward."
        )
    name = args.verifier or "math"
    get_verifier(name)  # fail here, not in a worker in the middle of the first step
    pool = VerifyPool(name, workers=args.verifier_workers, deadline_s=args.verifier_deadline_s)
    return AnswerJudge(pool), column


def build_engine(trainer: Any) -> Engine:
    """The engine over the model being trained: Unsloth's if Unsloth loaded it, else transformers. Raises ModelError."""
    args = trainer.args
    options: dict[str, Any] = {
        "eos_ids": trainer.eos_token_ids,
        "pad_id": trainer._tokenizer.pad_token_id,
        "max_cache_tokens": args.max_cache_tokens,
        "unwrap": lambda: unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=args.ds3_gather_for_generation
        ),
        "autocast": trainer.accelerator.autocast,
    }
    if trainer.is_fsdp_enabled:
        options["shares_prefill"] = False  # only the whole model gathers what is sharded
    if is_unsloth(trainer.model):
        return unsloth_engine(trainer.model, step=lambda: trainer.state.global_step, **options)
    return HFEngine(trainer.model, **options)


def build_desk(trainer: Any, engine: Engine, judge: Judge, clock: PhaseClock) -> Desk:
    """Everything the study stage needs, from the trainer's arguments. Raises ConfigError, ModelError."""
    args = trainer.args
    temperature = args.temperature if args.analysis_temperature is None else args.analysis_temperature
    options = StudyOptions(
        analysis=Sampling(args.analysis_max_tokens, temperature),
        replay=Sampling(args.max_completion_length, temperature),
        max_context_tokens=_context_for_analysis(args, trainer.model, engine),
        leak_policy=args.leak_policy,
        train_on=args.mel_train_on,
        replay_attempts=args.replay_attempts,
        control=args.needs_control,
        criterion=args.replay_criterion,
        run_seed=args.seed,
        chat_template_kwargs=trainer.chat_template_kwargs,
    )
    return Desk(engine, trainer._tokenizer, load_templates(args.templates), judge, options, clock)


def _context_for_analysis(args: MELConfig, model: Any, engine: Any) -> int:
    """Longest C_retro prompt: what the option says, or what the context of model and engine leaves beside the
    analysis."""
    context = min(context_length(model), getattr(engine, "context_tokens", None) or sys.maxsize)
    available = context - args.analysis_max_tokens
    wanted = args.max_context_tokens or available
    if not args.with_meta_experience:
        return max(wanted, MIN_CONTEXT_TOKENS)
    if wanted > available:
        raise ConfigError(
            f"max_context_tokens={wanted} plus analysis_max_tokens={args.analysis_max_tokens} exceeds the context of "
            f"{context} tokens. Lower one of them."
        )
    if wanted < MIN_CONTEXT_TOKENS:
        raise ModelError(
            f"Only {wanted} tokens are left for the analysis prompt (context {context}, "
            f"analysis_max_tokens={args.analysis_max_tokens}); it needs {MIN_CONTEXT_TOKENS}. Lower "
            "analysis_max_tokens or use a model with a longer context."
        )
    return wanted


def add_callback_once(trainer: Any, callback: TrainerCallback) -> None:
    """Add a callback unless the trainer has one of its class: `train` may be called again."""
    if not any(type(each) is type(callback) for each in trainer.callback_handler.callbacks):
        trainer.add_callback(callback)


class StepHook(TrainerCallback):
    """Calls back after each optimiser step, before the step is logged."""

    def __init__(self, after_step: Callable[[], None]) -> None:
        self._after_step = after_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._after_step()


class IdleWatch:
    """Says so, with the likely cure, when no group is mixed: then neither GRPO nor MEL has anything to learn from."""

    FIRST, AGAIN = 5, 25
    """Generation batches without a mixed group before the first warning, and between later ones."""

    def __init__(self) -> None:
        self.idle_batches = 0
        self._right = 0
        self._judged = 0

    def saw(self, groups: Sequence[Group]) -> None:
        """Count a generation batch."""
        if any(g.is_mixed for g in groups):
            self.idle_batches = self._right = self._judged = 0
            return
        self.idle_batches += 1
        self._right += sum(len(g.right) for g in groups)
        self._judged += sum(len(g.right) + len(g.wrong) for g in groups)
        if self.idle_batches == self.FIRST or self.idle_batches % self.AGAIN == 0:
            logger.warning("%s", self.advice())

    def advice(self) -> str:
        """What is wrong and what to change, in two sentences."""
        seen = f"The last {self.idle_batches} generation batches had no group with both a right and a wrong completion"
        if self._judged == 0:
            return f"{seen}: the verifier abstained on all of them. Check `verifier` and the answer column."
        rate = self._right / self._judged
        if rate > 0.5:
            return f"{seen} ({rate:.0%} right): the tasks are too easy. Use harder ones, or a higher temperature."
        return (
            f"{seen} ({rate:.0%} right): the tasks are too hard, or answers are not found. Use easier tasks, raise "
            "num_generations or max_completion_length, and look at completions/ for answers the verifier misses."
        )
