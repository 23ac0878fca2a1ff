"""MELTrainer: TRL's GRPOTrainer with one more learning signal.

One generation batch, top to bottom:

    _prepare_inputs                     each micro-batch gets its share of the lessons
      _generate_and_score_completions   act: G completions per prompt (`_roll_out`), TRL's rewards and advantages
        _calculate_rewards                verdicts along with the rewards (`rewards.py`)
        _estimated                        advantages of REINFORCE++ or RFT, where they replace GRPO's
        _draw                             pairs -> meta-experiences -> leak guard -> replay -> store
        _internalise                      lessons, and changes to the rollout batch (`lessons/internalise/`)
    training_step                       one micro-batch: forward and backward
      compute_loss                        in parts, within the memory limit (`training/batches`)
        _compute_loss                       TRL's policy loss + the internalisation's loss
          _get_per_token_logps...             one forward over rollout rows and lesson rows (`training/batches`)
    nonfinite.before_update             skip an update that is not finite (`nonfinite.py`)
    around_update                       NLL of the lessons after the update, and the norms of both gradients
    _save_checkpoint                    staged, hashed, renamed (`checkpoints.py`)

B rollouts of a micro-batch, C padded completion width, S accumulation steps per generation batch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list, gather_object

from mel_lite import signals
from mel_lite.config import MELConfig
from mel_lite.engines.base import Engine
from mel_lite.engines.metered import MeteredEngine, PhaseClock
from mel_lite.lessons.bank.updates import Ranks, choose_pairs, update_bank
from mel_lite.lessons.internalise import (
    DrawnBatch,
    LessonShare,
    RolloutBatch,
    ScoredMicroBatch,
    checked_entries,
    deal_lessons,
    get_internalisation,
    token_credit,
)
from mel_lite.lessons.pipeline import draw_lessons
from mel_lite.lessons.store import ExperienceRow, ExperienceStore
from mel_lite.models.peft_support import building_adapter
from mel_lite.option_checks import lessons_for
from mel_lite.resilience.checkpoints import AtomicCheckpoints
from mel_lite.resilience.collapse import CollapseWatch
from mel_lite.resilience.nonfinite import NonFiniteGuard
from mel_lite.resilience.saved_bank import build_bank
from mel_lite.resilience.stop_cleanly import CleanStop
from mel_lite.resilience.tracker_tables import send_lessons
from mel_lite.resilience.trackers import SideService, guard_trackers, guarded_tables
from mel_lite.training.around_update import AroundTheUpdate
from mel_lite.training.assemble import (
    build_context,
    build_engine,
    build_judge,
    check_arguments,
    check_conversations,
    check_internalisation,
    check_support,
    correct_by_importance,
    default_args,
    engine_generates,
    follow_sampling_options,
    free_reward_arguments,
    prepare_weights,
)
from mel_lite.training.batches.forward import MicroBatchForward
from mel_lite.training.batches.micro_batches import MicroBatches
from mel_lite.training.cut_mass import CutMass
from mel_lite.training.engine_probe import EngineProbe
from mel_lite.training.frozen_reader import FrozenReader
from mel_lite.training.metrics import FunnelTotals, GradientMeter, MetricsWriter, fill_phases, funnel, mean_over_ranks
from mel_lite.training.prompts.dynamic_sampling import build_dynamic_sampling
from mel_lite.training.prompts.sampler import EpochSampler
from mel_lite.training.rewards import GenerationBatch, JudgedRewards, groups_of
from mel_lite.training.rollouts import build_in_flight, check_overlap, rollout_requests, rollout_sampling
from mel_lite.training.savings import Savings
from mel_lite.training.scoring import Scorer, install_scoring_heads
from mel_lite.training.sharding.weights import with_whole_weights
from mel_lite.trl_compat import released_grpo_trainer
from mel_lite.types import Experience, Group, LessonNormalization, Pair
from mel_lite.verify.judge import RewardJudge

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = released_grpo_trainer()


class MELTrainer(CleanStop, AtomicCheckpoints, MicroBatches, JudgedRewards, GRPOTrainer):
    """Train with GRPO and Meta-Experience Learning: maximize J_RLVR + lambda * J_MEL in one update.

    Takes `trl.GRPOTrainer`'s arguments, in its order, plus:

    Args:
        reward_funcs: TRL reward functions. Optional when the verifier judges: then a right completion earns 1, a wrong
            one 0, and one the verifier abstains on nothing.
        engine: Samples rollouts, analyses and replays. Default: transformers, on the model being trained.

    Raises: ConfigError, DataError, ModelError for arguments that cannot work, before anything is trained.

    Source: Meta-Experience Learning, arXiv 2602.10224.
    """

    train_sampler: EpochSampler | None = None

    _tag_names = ("trl", "grpo", "mel", "mel-lite")
    _name = "MEL"
    _paper: ClassVar = {
        "title": "Internalizing Meta-Experience into Memory for Guided Reinforcement Learning in Large Language Models",
        "id": "2602.10224",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: MELConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        engine: Engine | None = None,
    ) -> None:
        args = lessons_for(args or default_args(model), tools, environment_factory)
        check_arguments(args, train_dataset, environments=bool(environment_factory))
        self.internalisation = get_internalisation(args.internalisation, args.internalisation_options)
        check_internalisation(args, self.internalisation)
        self.bank = build_bank(args, used=self.internalisation.uses_bank)
        self.judge, self.answer_column = build_judge(args, train_dataset, self.rewards_of)
        self.clock = PhaseClock()
        self.side_service = SideService("A table of completions or an upload")
        if reward_funcs is None and not isinstance(self.judge, RewardJudge):
            reward_funcs = self._verifier_reward
        own_rollouts = rollout_func is None and engine_generates(args, tools, environment_factory)
        check_overlap(args, self.internalisation, train_dataset, engine, own_rollouts=own_rollouts)
        with warnings.catch_warnings(), building_adapter(self, model, peft_config):
            # TRL marks the hook as experimental; following its changes is our task, not the user's.
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=self._roll_out if own_rollouts else rollout_func,
                environment_factory=environment_factory,
            )
        check_support(self)
        check_conversations(self)
        follow_sampling_options(self)
        free_reward_arguments(self)
        prepare_weights(self)
        install_scoring_heads(self)
        self.engine = MeteredEngine(engine or build_engine(self), self.clock)
        self.cut_mass = CutMass(self)
        self.engine_probe = None
        if self.rollout_func == self._roll_out:
            self.engine_probe = EngineProbe(self)
            if self.engine.own_kernels:
                correct_by_importance(self)
        self.dynamic_sampling = build_dynamic_sampling(self)
        self.scorer = Scorer(self)
        self.lesson_context = build_context(self)
        self.in_flight = build_in_flight(self)
        reads_start = args.with_meta_experience and self.internalisation.needs_frozen_reader
        self.frozen_reader = FrozenReader(self.model) if reads_start else None
        self._store: ExperienceStore | None = None
        self.gradient_meter = GradientMeter(list(self.model.parameters()), every=args.grad_norm_every)
        self.trained_lessons = []
        self.funnel_totals = FunnelTotals()
        self.nonfinite = NonFiniteGuard(self)
        self.collapse = CollapseWatch(self)
        self.savings = Savings(self)
        parts = (self.engine, self.funnel_totals, self.collapse, self.savings, self.bank)
        optional = (*parts, getattr(self.dynamic_sampling, "memory", None), self.in_flight)
        self.stateful = tuple(each for each in optional if each is not None)
        self.add_callback(MetricsWriter(Path(args.output_dir) / "metrics.jsonl"))
        self.add_callback(AroundTheUpdate(self))

    # ---- Act ----

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's rollout hook: one completion per prompt, and with the overlapped schedule the lessons in flight."""
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        requests, sampling = rollout_requests(self, prompts, prompt_ids), rollout_sampling(self)
        in_flight = self.in_flight if self.model.training else None
        asked = [] if in_flight is None else in_flight.requests(self.lesson_context, batch=self._batch)
        with self.clock("rollout") if self.model.training else self.engine.evaluating():
            self.engine.wake()
            completions, of_lessons = self.engine.generate_with(asked, requests, sampling)
            self.engine.sleep()  # scoring comes next and needs the memory
        if in_flight is not None:
            in_flight.answer(of_lessons)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(c.ids) for c in completions],
            "logprobs": [list(c.logprobs) for c in completions],
        }

    @property
    def _batch(self) -> int:
        """Number of the generation batch, from which its seeds count."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    def _get_train_sampler(self, dataset: Any = None) -> EpochSampler:
        self.train_sampler = EpochSampler(super()._get_train_sampler(dataset))
        return self.train_sampler

    # ---- Self-verify ----

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Return the next micro-batch; TRL generates a new batch when the last one is used up."""
        scored = GenerationBatch(generation_batch)
        batch = super()._prepare_inputs(scored)
        self.engine.sleep()
        if self.model.training:
            # TRL has shuffled and split the rollouts by now; the lessons belong to no row.
            for micro_batch, share in zip(self._buffered_inputs, scored.shares, strict=False):
                micro_batch["lessons"] = share
            self.nonfinite.saw_batch(batch)
        return batch

    @with_whole_weights
    def _generate_and_score_completions(self, inputs: Any) -> Any:
        scored = inputs if isinstance(inputs, GenerationBatch) else GenerationBatch(inputs)
        batch = self.policy_batch(scored)
        if self.model.training:
            if self.args.with_meta_experience:
                drawn = self._draw(groups_of(gather_object(scored.rollouts), self.num_generations))
                batch = self._internalise(drawn, batch, scored)
            self.collapse.saw_batch(batch, has_lessons=any(share.lessons for share in scored.shares))
        return batch

    def _draw(self, groups: list[Group]) -> DrawnBatch:
        """Draw and store this batch's meta-experiences. Ranks share the pairs; every rank gets every outcome."""
        args, batch, step = self.args, self._batch, self.state.global_step
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        ranks = Ranks(rank, world, gather_object)
        pairs: list[Pair] = []
        if self.internalisation.writes_lessons:
            pairs, spared = choose_pairs(
                groups, self.bank, self.lesson_context, ranks,
                per_group=args.pairs_per_group, strategy=args.pair_strategy, step=batch,
            )  # fmt: skip
            self.add_metrics(spared)
        local: list[Experience] = []
        unfit: list[tuple[Pair, str]] = []
        if self.in_flight is not None:  # these pairs come later; earlier ones are complete now
            local, unfit = self.in_flight.advance(pairs[rank::world], self.lesson_context, step=step, batch=batch)
            self.add_metrics({"mel/in_flight": len(self.in_flight.waiting)})
        elif pairs:
            self.engine.wake()
            local, unfit = draw_lessons(pairs[rank::world], self.lesson_context, step=step, batch=batch)
            self.engine.sleep()  # what follows scores texts or trains, and needs the memory
        experiences: list[Experience] = sorted(
            gather_object(local), key=lambda e: (e.rollouts_step, e.analysis.pair.index)
        )
        row_ids = [0] * len(experiences)
        if self.is_world_process_zero():
            row_ids = self.store.add(experiences)
        row_ids = broadcast_object_list([row_ids], from_process=0)[0]
        self.add_metrics({"mel/unfit_pairs": len(gather_object(unfit))})
        self.collapse.idle.saw(groups)
        self.collapse.saw_analyses(experiences)
        drawn = DrawnBatch(
            tuple(zip(row_ids, experiences, strict=True)), tuple(groups), self.lesson_context, len(pairs),
            self.mel_weight, self.bank,
        )  # fmt: skip
        if self.bank is not None:
            with self.clock("examine"):
                self.add_metrics(update_bank(self.bank, drawn, ranks))
        return drawn

    def _internalise(self, drawn: DrawnBatch, batch: dict[str, Any], scored: GenerationBatch) -> dict[str, Any]:
        """Turn meta-experiences into what is trained on: lessons dealt to micro-batches, and batch entries."""
        lessons = self.internalisation.lessons(drawn)
        scored.shares = deal_lessons(
            lessons, rank=self.accelerator.process_index, world=self.accelerator.num_processes,
            micro_batches=self.args.steps_per_generation, total_weight=drawn.weight,
            denominator=None if self.args.mel_normalization == LessonNormalization.KEPT else len(drawn.groups),
        )  # fmt: skip
        tokens = sum(len(each.target_ids) for each in lessons)
        stages = funnel(drawn.groups, drawn.pairs, [each for _, each in drawn.experiences], tokens)
        self.add_metrics(stages)
        self.funnel_totals.add(stages)
        rollouts = RolloutBatch(tuple(scored.rollouts), batch)
        with self.clock("internalise"):
            entries = self.internalisation.batch_entries(drawn, rollouts, self.scorer)
            most, step = self.args.token_credit_rollouts, self.state.global_step
            credit = token_credit(self.internalisation, drawn, rollouts, step=step, most=most, gather=gather_object)
        if credit and self.is_world_process_zero():
            self.store.add_credit(credit)
        self.add_metrics(mean_over_ranks(self.internalisation.metrics()))
        return batch | checked_entries(self.internalisation, entries, batch)

    # ---- Learn ----

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        with self.clock.rest("update"):
            self.stop_together()
            with self.polling_in_layers():
                loss = super().training_step(model, inputs, num_items_in_batch)
            signals.poll()
        self.nonfinite.saw_loss(loss)
        return loss

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """Return TRL's policy loss plus the internalisation's loss, both from one forward."""
        if self.scores_in_one_forward and not isinstance(model, MicroBatchForward):
            model = self.forward_of(model, inputs)
        policy_loss = super()._compute_loss(model, inputs)
        if not self.model.training:
            return policy_loss
        steps = self.current_gradient_accumulation_steps
        self.add_metrics({"mel/policy_loss": policy_loss.item() * steps})
        self.add_metrics(self.cut_mass.measure(getattr(model, "logp_BC", None), inputs))
        measured = self.gradient_meter.is_due(self.state.global_step)
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if measured and scaler is not None else 1.0
        if measured:
            self.gradient_meter.add("policy", policy_loss, scale=scale)
        if not (self.args.with_meta_experience and isinstance(model, MicroBatchForward)):
            return policy_loss
        share = inputs.get("lessons", LessonShare())
        assert model.logp_BC is not None, "TRL's loss scores the rollouts"
        mel_loss = self.internalisation.loss(
            ScoredMicroBatch(
                inputs, model.logp_BC, share.lessons, model.lesson_logps, self.mel_weight / steps, share.weight / steps,
                self.mel_weight / self.tokens_per_micro_batch(inputs), model.kl_BC,
            )
        )  # fmt: skip
        if mel_loss is None:
            return policy_loss
        self.add_metrics({"mel/internalisation_loss": mel_loss.item() * steps})
        if measured:
            self.gradient_meter.add("nll", mel_loss, scale=scale)
        return policy_loss + mel_loss

    @property
    def mel_weight(self) -> float:
        """lambda of the current generation batch."""
        return self.args.mel_weight_at(self._batch * self.args.steps_per_batch)

    # ---- Shared ----

    @property
    def store(self) -> ExperienceStore:
        """The run's experience store, opened on first use so that a trainer that never trains leaves no file."""
        if self._store is None:
            self._store = ExperienceStore(Path(self.args.output_dir) / "experiences.sqlite")
        return self._store

    @property
    def last_experience_id(self) -> int | None:
        """Row id of the newest meta-experience; None before the store was opened."""
        return None if self._store is None else self._store.last_id()

    def latest_sample(self) -> ExperienceRow | None:
        """Return the newest meta-experience worth showing; None before the first."""
        return None if self._store is None else self._store.sample()

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Add to the training metrics that TRL averages and logs."""
        for name, value in metrics.items():
            self._metrics["train"][name].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        fill_phases(self._metrics["train"])
        with guarded_tables(self.side_service):
            super().log(logs, start_time)
            send_lessons(self)

    def add_callback(self, callback: Any) -> None:
        super().add_callback(callback)
        guard_trackers(self.callback_handler.callbacks)
