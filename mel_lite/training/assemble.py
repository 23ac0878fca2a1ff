"""Check a trainer's arguments and build its parts: judge, engine, lesson context."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl.models import unwrap_model_for_generation

from mel_lite.config import MELConfig
from mel_lite.data.cells import (
    IMAGE_COLUMNS,
    REWARD_ARGUMENTS,
    check_dataset,
    check_kind,
    column_cells,
    without_columns,
)
from mel_lite.data.tasks import ANSWER_COLUMNS
from mel_lite.engines.base import Engine, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.engines.unsloth import adapter_fingerprint, is_unsloth, unsloth_engine
from mel_lite.engines.vllm_server import VLLMServerEngine
from mel_lite.errors import ConfigError, DataError, ModelError
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.internalise import Internalisation
from mel_lite.lessons.prompts import load_templates
from mel_lite.models.chat import check_conversation
from mel_lite.models.generation import make_generation_config_valid
from mel_lite.models.load import context_length, keep_four_bit_layout
from mel_lite.models.peft_support import is_peft
from mel_lite.training.rollouts import early_end
from mel_lite.training.scoring import balances_experts
from mel_lite.training.services import check_services
from mel_lite.training.sharding.checks import check_sharding, settle_sharding
from mel_lite.types import Group, ReplayCriterion
from mel_lite.verify.judge import AnswerJudge, Judge, RewardJudge, answer_column
from mel_lite.verify.pool import VerifyPool
from mel_lite.verify.thoughts import parse_tags
from mel_lite.verify.verifiers import callable_name, get_verifier

logger = logging.getLogger(__name__)

MIN_CONTEXT_TOKENS = 256
"""Fewest tokens that hold the instruction and two solutions."""


def default_args(model: Any) -> MELConfig:
    """Return TRL's default output folder with our suffix, for a trainer built without `args`."""
    name = model if isinstance(model, str) else model.config._name_or_path
    return MELConfig(f"{name.split('/')[-1]}-MEL")


def check_arguments(args: Any, train_dataset: Any, *, environments: bool) -> None:
    """Refuse arguments that would fail or mislead later. Raises ConfigError or DataError."""
    if not isinstance(args, MELConfig):
        raise ConfigError(
            f"args is a {type(args).__name__}, but MELTrainer needs a MELConfig: it has every GRPOConfig option. "
            "Replace GRPOConfig(...) by MELConfig(...)."
        )
    check_services(args)
    check_sharding(args)
    check_kind(train_dataset)
    if train_dataset is not None and hasattr(train_dataset, "__len__") and len(train_dataset) == 0:
        raise DataError("train_dataset is empty: there is nothing to train on. Check the file, split and filters.")
    answers = answer_column(columns_of(train_dataset))
    check_dataset(train_dataset, answers, lessons=args.with_meta_experience, environments=environments)
    if train_dataset is not None and hasattr(train_dataset, "__len__"):
        check_rows(args, len(train_dataset))
    if args.grad_norm_every and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ConfigError(
            "grad_norm_every with gradient_checkpointing_kwargs={'use_reentrant': True}: reentrant checkpointing "
            "cannot take the gradient of one loss term. Set use_reentrant to False, or grad_norm_every=0."
        )


def check_rows(args: MELConfig, rows: int | None) -> None:
    """Refuse a dataset that fills no generation batch: TRL's sampler drops an incomplete one, so nothing would train.

    `rows`: None = a stream, which ended before the first step. Raises: DataError.
    """
    needed = args.generation_batch_size // args.num_generations
    if rows is None or rows < needed:
        found = "ended too early" if rows is None else f"has {rows} row{'' if rows == 1 else 's'}"
        raise DataError(
            f"train_dataset {found}: one step needs {needed} different prompts (generation_batch_size="
            f"{args.generation_batch_size} / num_generations={args.num_generations}), so nothing would be trained. Add "
            "rows, or lower per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation."
        )


def free_reward_arguments(trainer: Any) -> None:
    """Leave out columns of the datasets that TRL would confuse with values of its own. Warns with their names."""
    names = REWARD_ARGUMENTS if trainer._is_vlm else (*REWARD_ARGUMENTS, *IMAGE_COLUMNS)
    trainer.train_dataset = without_columns(trainer.train_dataset, names)
    trainer.eval_dataset = without_columns(trainer.eval_dataset, names)


def check_conversations(trainer: Any) -> None:
    """Render every conversation of the datasets once, so that none fails in the middle of a run.

    Images, and conversations with tools, are left to TRL. Streamed rows are rendered in use.

    Raises: ModelError with the row that the chat template rejects.
    """
    if trainer._is_vlm or trainer.tools:
        return
    datasets, held_out = {"train_dataset": trainer.train_dataset}, trainer.eval_dataset
    if isinstance(held_out, dict):
        datasets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in held_out.items()}
    else:
        datasets["eval_dataset"] = held_out
    for name, dataset in datasets.items():
        for number, prompt in column_cells(dataset, "prompt"):
            try:
                check_conversation(prompt, trainer._tokenizer, trainer.chat_template_kwargs)
            except ModelError as error:
                raise ModelError(f"{name}, row {number}, column 'prompt': {error}") from error


SAMPLING_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling options that our engines follow."""
_OTHER_ENGINES = ("use_vllm", "use_transformers_continuous_batching")
_TRL_GENERATION = (*_OTHER_ENGINES, "generation_kwargs", "cache_implementation")
"""Options of TRL's own generation, which our engines do not follow."""


def engine_generates(args: MELConfig, tools: Any, environment_factory: Any) -> bool:
    """Return True when rollouts come from our engine, False when TRL generates with options of its own.

    Raises: ConfigError when meta-experience is on and rollouts would come from another engine than the lessons.
    """
    foreign = [name for name in _TRL_GENERATION if getattr(args, name)]
    if set(args.generation_kwargs or {}) <= set(SAMPLING_OPTIONS):
        foreign = [name for name in foreign if name != "generation_kwargs"]  # `follow_sampling_options` applies them
    for name in foreign if args.with_meta_experience else ():
        if name in _OTHER_ENGINES:
            raise ConfigError(
                f"{name}={getattr(args, name)!r} with meta-experience: rollouts, analyses and replays must come from "
                f"one engine, which does not follow that option. Unset {name}, or set algorithm='grpo'."
            )
        logger.warning(
            "%s=%r: TRL's generation samples the rollouts, since the engine does not follow that option. Analyses and "
            "replays are sampled without it.",
            name, getattr(args, name),
        )  # fmt: skip
    return not (foreign or tools or environment_factory)


def follow_sampling_options(trainer: Any) -> None:
    """Let the sampling options in `generation_kwargs` override the trainer's own, like in TRL."""
    for name, value in (trainer.args.generation_kwargs or {}).items():
        if name in SAMPLING_OPTIONS:
            setattr(trainer, name, value)


def check_support(trainer: Any) -> None:
    """Refuse models and set-ups that cannot train lessons. Raises ConfigError or ModelError."""
    in_parts = {name: getattr(trainer.args, name) for name in ("max_micro_batch_tokens", "skip_zero_advantage")}
    if wanted := [f"{name}={value}" for name, value in in_parts.items() if value]:
        if trainer._is_vlm:
            raise ConfigError(
                f"{wanted[0]} with a model that takes images: its batches cannot be taken in parts. Unset it, and "
                "lower per_device_train_batch_size instead."
            )
    four_bit = bool(getattr(trainer.model, "is_loaded_in_4bit", False))
    check_sharding(trainer.args, load_in_4bit=four_bit, adapter=is_peft(trainer.model))
    settle_sharding(trainer)
    if trainer._is_vlm:
        if trainer.args.with_meta_experience:
            raise ModelError("Meta-experience is text-only; this model takes images. Set algorithm='grpo'.")
        trainer.rollout_func = None  # only TRL's own generation passes images on
    if trainer.aux_loss_enabled:
        _check_load_balancing(trainer)
    if not trainer.args.with_meta_experience:
        return
    _check_head(trainer)


def check_internalisation(args: MELConfig, way: Internalisation) -> None:
    """Refuse a way whose lessons or proofs are switched off. Raises ConfigError."""
    if not args.with_meta_experience:
        return
    if way.needs_replay and not ReplayCriterion(args.replay_criterion).replays:
        raise ConfigError(
            f"internalisation={args.internalisation!r} trains on replays, but replay_criterion="
            f"{args.replay_criterion!r} generates none. Set replay_criterion='scored+solved'."
        )


def _check_head(trainer: Any) -> None:
    head = trainer.model.get_output_embeddings()
    if trainer.internalisation.needs_frozen_head and any(weight.requires_grad for weight in head.parameters()):
        raise ConfigError(
            "internalisation_options: the divergence between two readings is taken under one head, but the model's "
            f"head ({type(head).__name__}) is trained. Train a LoRA adapter that leaves it out, freeze the head (in a "
            "recipe: model.freeze_head=true), or set form='sampled' with mask='all' or 'fork'."
        )


def _check_load_balancing(trainer: Any) -> None:
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    coefficient = f"router_aux_loss_coef={trainer.router_aux_loss_coef}"
    if not trainer._is_vlm and not balances_experts(base):
        raise ConfigError(
            f"{coefficient}: the load-balancing loss of {type(base).__name__} is not known. Set "
            "router_aux_loss_coef=0 to train without it."
        )
    if trainer.args.skip_zero_advantage:
        raise ConfigError(
            f"skip_zero_advantage=True with {coefficient}: the load-balancing loss is over all rollouts. Unset one."
        )
    if trainer.args.with_meta_experience:
        logger.warning("%s: the load-balancing loss is over the rollouts; lessons do not count in it.", coefficient)


def prepare_weights(trainer: Any) -> None:
    """Convert weights to the form training needs: portable 4-bit layers, and float32 adapters under fp16.

    TRL keeps the adapter of a 4-bit base in bfloat16, on which the gradient scaler of fp16 training fails.
    """
    keep_four_bit_layout(trainer.model)
    base = trainer.model.get_base_model() if is_peft(trainer.model) else trainer.model
    make_generation_config_valid(base)  # a checkpoint of the full model contains it
    if trainer.args.fp16:
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()


def columns_of(dataset: Any) -> list[str]:
    """Return the column names of a dataset; of a streamed one without names, those of its first row."""
    return list(getattr(dataset, "column_names", None) or next(iter(dataset or []), {}))


def build_judge(
    args: MELConfig, train_dataset: Any, rewards_of: Callable[[Sequence[Group], Sequence[str]], list[float]]
) -> tuple[Judge, str | None]:
    """Return the judge of completions and the answer column it reads (None when rewards are the judge).

    Raises: DataError when `verifier` is set and the dataset has no answer; VerifierError for an unknown verifier.
    """
    columns = columns_of(train_dataset)
    column = answer_column(columns)
    if args.verifier is None and column is None:
        if args.world_size > 1 and args.with_meta_experience:
            raise ConfigError(
                "verifier=None on several processes: replays would be judged by reward functions, whose results TRL "
                "gathers on all ranks at once. Set verifier, and name the answer's column one of "
                f"{', '.join(ANSWER_COLUMNS)}."
            )
        return RewardJudge(rewards_of, args.verifier_threshold), None
    if column is None:
        name = callable_name(args.verifier) if callable(args.verifier) else args.verifier
        raise DataError(
            f"verifier={name!r} needs a reference answer, but the dataset has only the columns "
            f"{', '.join(columns) or 'none'}. Rename the answer's column to one of {', '.join(ANSWER_COLUMNS)}, or "
            "leave verifier unset to judge by reward."
        )
    verifier = args.verifier or "math"
    get_verifier(verifier)  # fail here, not in a worker during the first step
    pool = VerifyPool(
        verifier,
        workers=args.verifier_workers,
        deadline_s=args.verifier_deadline_s,
        think_tags=parse_tags(args.think_tags),
    )
    return AnswerJudge(pool), column


def build_engine(trainer: Any) -> Engine:
    """Build the engine over the trained model: Unsloth's if Unsloth loaded it, else transformers. Raises ModelError."""
    args = trainer.args
    if args.engine_url is not None:
        return _server_engine(trainer)
    options: dict[str, Any] = {
        "eos_ids": trainer.eos_token_ids,
        "pad_id": trainer._tokenizer.pad_token_id,
        "max_cache_tokens": args.max_cache_tokens,
        "unwrap": lambda: unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=args.ds3_gather_for_generation
        ),
        "autocast": trainer.accelerator.autocast,
        "merges_adapter": lambda: trainer.savings.merges_to_sample,
        "buckets": lambda: trainer.savings.samples_in_buckets,
    }
    if trainer.sharding.fsdp or trainer.sharding.zero3:
        options["unwrap"] = trainer.sharding.whole
    if is_unsloth(trainer.model):
        return unsloth_engine(trainer.model, step=lambda: trainer.state.global_step, **options)
    return HFEngine(trainer.model, **options)


def _server_engine(trainer: Any) -> Engine:
    """Build the engine over the server at `engine_url`. Raises ConfigError when no adapter can be sent to it."""
    args, model = trainer.args, trainer.model
    if not is_peft(model):
        raise ConfigError(
            f"engine_url={args.engine_url!r} without a LoRA adapter: nothing else can be sent to a server. Pass a "
            "peft_config, or unset engine_url."
        )
    return VLLMServerEngine(
        args.engine_url,
        base=model.get_base_model().config.name_or_path,
        save_adapter=lambda folder: model.save_pretrained(folder, selected_adapters=[model.active_adapter]),
        version=lambda: (trainer.state.global_step, adapter_fingerprint(model)),
        eos_ids=trainer.eos_token_ids,
        exchange=Path(args.engine_exchange or Path(args.output_dir) / "engine_adapters"),
        cpu=args.use_cpu,
    )


def build_context(trainer: Any) -> LessonContext:
    """Build what every stage of lesson drawing shares, from the trainer's arguments. Raises ConfigError, ModelError."""
    args = trainer.args
    temperature = trainer.temperature if args.analysis_temperature is None else args.analysis_temperature
    templates = load_templates(args.templates)
    hopeless = early_end(args, trainer._tokenizer, templates, trainer.chat_template_kwargs)
    ends = None if hopeless is None else lambda ids: bool(hopeless(ids))
    return LessonContext(
        engine=trainer.engine,
        tokenizer=trainer._tokenizer,
        templates=templates,
        judge=trainer.judge,
        clock=trainer.clock,
        analysis=Sampling(args.analysis_max_tokens, temperature, is_hopeless=ends),
        replay=Sampling(args.max_completion_length, temperature),
        max_context_tokens=_context_for_analysis(args, trainer.model, trainer.engine),
        context_tokens=context_length(trainer.model),
        scorer=trainer.scorer,
        run_seed=args.seed,
        mark_fork=args.mark_fork,
        leak_policy=args.leak_policy,
        trains_whole_analysis=trainer.internalisation.trains_whole_analysis,
        replay_attempts=args.replay_attempts,
        control=args.needs_control,
        replay_criterion=args.replay_criterion,
        chat_template_kwargs=trainer.chat_template_kwargs,
        hopeless=hopeless,
    )


def correct_by_importance(trainer: Any) -> None:
    """Let TRL weight each token by trainer / engine probability, as it does for its own vLLM.

    It applies to engines with their own kernels, whose log-probs differ from the trainer's by rounding.
    """
    trainer.use_vllm = True
    trainer.vllm_generation = NoWeightSync()
    trainer._last_loaded_step = -1


class NoWeightSync:
    """Takes the place of TRL's vLLM client: our engine receives the adapter with every request."""

    def sync_weights(self) -> None:
        """Do nothing."""


def _context_for_analysis(args: MELConfig, model: Any, engine: Any) -> int:
    """Return the longest C_retro prompt: the option, or what the context of model and engine leaves to the analysis."""
    context = min(context_length(model), engine.context_tokens or sys.maxsize)
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
