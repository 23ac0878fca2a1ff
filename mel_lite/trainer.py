"""MELTrainer: TRL's GRPOTrainer with one more learning signal.

One generation batch, top to bottom:

    _generate_and_score_completions   act: G completions per prompt (`_roll_out`), TRL's rewards and advantages
      _calculate_rewards                verdicts beside the rewards (`rewards.py`)
      _estimated                        advantages of REINFORCE++ or RFT, where they are not GRPO's
      _study                            pairs -> meta-experiences -> leak guard -> replay -> store -> lessons
    _prepare_inputs                   each accumulation step takes its share of the lessons
    _compute_loss                     TRL's policy loss + lambda * token-averaged NLL of the lessons
      _get_per_token_logps...           one forward over rollout rows and lesson rows (`token_budget.py`)
    _after_step                       what the update did to the lessons, and the norms of both gradients
    _save_checkpoint                  staged, hashed, renamed (`checkpointing.py`)

B rollouts of a micro-batch, C padded completion width, S accumulation steps per generation batch.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import broadcast_object_list, gather_object

from mel_lite.config import MELConfig
from mel_lite.engines.base import Engine, Request, Sampling
from mel_lite.engines.hf import evaluating
from mel_lite.lessons.pairs import select_pairs
from mel_lite.lessons.parsing import lesson_from
from mel_lite.lessons.pipeline import study
from mel_lite.lessons.store import ExperienceRow, ExperienceStore
from mel_lite.resilience.mixins import ResilientRun
from mel_lite.seeds import prompt_hash, seed_for
from mel_lite.training.assemble import (
    IdleWatch,
    StepHook,
    build_desk,
    build_engine,
    build_judge,
    check_arguments,
    check_support,
    default_args,
    engine_generates,
    settle_weights,
)
from mel_lite.training.metrics import FUNNEL_COUNTS, GradientMeter, MeteredEngine, MetricsWriter, PhaseClock, funnel
from mel_lite.training.packing import pack
from mel_lite.training.rewards import JudgedRewards
from mel_lite.training.scoring import install_scoring_head, score
from mel_lite.trl_compat import released_grpo_trainer
from mel_lite.types import Experience, Group, Lesson, Rollout, Status
from mel_lite.verify.judge import Judge, RewardJudge

if TYPE_CHECKING:
    from trl import GRPOTrainer
else:
    GRPOTrainer = released_grpo_trainer()


class MELTrainer(ResilientRun, JudgedRewards, GRPOTrainer):
    """Trains with GRPO and Meta-Experience Learning: maximises J_RLVR + lambda * J_MEL in one update.

    Takes `trl.GRPOTrainer`'s arguments, in its order, plus:

    Args:
        reward_funcs: TRL reward functions. May be left out when `args.verifier` is set: then a right completion earns
            1, a wrong one 0, and one the verifier abstains on nothing at all.
        engine: What samples rollouts, analyses and replays. Default: transformers, on the model being trained.

    Raises: ConfigError, DataError, ModelError for arguments that cannot work, before anything is trained.

    Source: Meta-Experience Learning, arXiv 2602.10224.
    """

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
        args = args or default_args(model)
        check_arguments(args, train_dataset, multi_turn=bool(tools or environment_factory))
        self._judge, self._answer_column = build_judge(args, train_dataset, self._rewards_of)
        self._clock = PhaseClock()
        self._engine: MeteredEngine | None = None
        if reward_funcs is None and not isinstance(self._judge, RewardJudge):
            reward_funcs = self._verifier_reward
        with warnings.catch_warnings():
            # The hook is TRL's and marked experimental; here it is ours to follow, not the user's to worry about.
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
                rollout_func=rollout_func
                or (self._roll_out if engine_generates(args, tools, environment_factory) else None),
                environment_factory=environment_factory,
            )
        check_support(self)
        settle_weights(self)
        for scored in filter(None, (self.model, self.ref_model)):
            base = scored.get_base_model() if hasattr(scored, "get_base_model") else scored
            install_scoring_head(base)
        self._engine = MeteredEngine(engine or build_engine(self), self._clock)
        self._desk = build_desk(self, self._engine, self._judge, self._clock)
        self._store: ExperienceStore | None = None
        self._meter = GradientMeter(list(self.model.parameters()))
        self._idle = IdleWatch()
        self.funnel_totals: Counter[str] = Counter()
        self._scored: list[tuple[Group, Rollout]] = []
        self._shares: list[tuple[Lesson, ...]] = [()] * args.steps_per_generation
        self._lesson_weight = 0.0
        self._riding: tuple[Lesson, ...] = ()
        self._ridden_logps: list[torch.Tensor] = []
        self._trained: list[tuple[Lesson, torch.Tensor]] = []
        self.add_callback(StepHook(self._after_step))
        self.add_callback(MetricsWriter(Path(args.output_dir) / "metrics.jsonl"))

    # ---- Act ----

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """TRL's rollout hook: one completion per prompt, seeded by (run seed, step, prompt, row over all ranks)."""
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        first = self.accelerator.process_index * len(prompts)
        step, purpose = (self._batch, "rollout") if self.model.training else (self.state.global_step, "eval_rollout")
        requests = [
            Request(
                tuple(ids),
                seed_for(self.args.seed, step=step, prompt_hash=prompt_hash(p), index=first + i, purpose=purpose),
            )
            for i, (p, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
        ]
        sampling = Sampling(
            self.max_completion_length, self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty
        )
        with self._clock("rollout"):
            self.engine.wake()
            completions = self.engine.generate(requests, sampling)
            self.engine.sleep()  # scoring comes next, which needs the memory
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(c.ids) for c in completions],
            "logprobs": [list(c.logprobs) for c in completions],
        }

    @property
    def _batch(self) -> int:
        """Number of the generation batch: the counter of its seeds."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    # ---- Self-verify ----

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = self._estimated(super()._generate_and_score_completions(inputs))
        if self.model.training and self.args.with_meta_experience:
            self._study(self._groups(gather_object(self._scored)))
        return batch

    def _groups(self, rows: list[tuple[Group, Rollout]]) -> list[Group]:
        """Rows of all ranks back into groups: TRL's sampler keeps the G completions of a prompt together."""
        groups = []
        for first in range(0, len(rows), self.num_generations):
            members = rows[first : first + self.num_generations]
            question = members[0][0]
            assert all(g.prompt_hash == question.prompt_hash for g, _ in members), "a group was torn apart"
            rollouts = tuple(r for _, r in members)
            groups.append(Group(question.prompt, question.prompt_hash, rollouts, question.answer, question.columns))
        return groups

    def _study(self, groups: list[Group]) -> None:
        """Draw this batch's lessons. Ranks share the pairs; all of them learn every outcome."""
        args, batch, rank, world = self.args, self._batch, *self._rank_and_world()
        pairs = select_pairs(
            groups, per_group=args.pairs_per_group, strategy=args.pair_strategy, run_seed=args.seed, step=batch
        )
        self.engine.wake()
        mine, unfit = study(pairs[rank::world], self._desk, step=self.state.global_step, batch=batch)
        experiences: list[Experience] = sorted(gather_object(mine), key=lambda e: e.analysis.pair.index)
        lessons = [
            lesson_from(
                e.analysis,
                e.parsed,
                tokenizer=self._tokenizer,
                redacted=e.leak.redacted if e.leak else None,
                train_on=args.mel_train_on,
                experience_id=experience_id,
            )
            for experience_id, e in zip(self._record(experiences), experiences, strict=True)
            if e.status is Status.KEPT and e.parsed is not None
        ]
        self._share_out(lessons, prompts=len(groups))
        trained_tokens = sum(len(lesson.target_ids) for lesson in lessons)
        stages = funnel(groups, len(pairs), experiences, trained_tokens)
        self._log_metrics(stages)
        self.funnel_totals.update({name: int(stages[name]) for name in FUNNEL_COUNTS})
        self._log_metrics({"mel/unfit_pairs": len(gather_object(unfit))})
        self._idle.saw(groups)

    def _record(self, experiences: list[Experience]) -> list[int]:
        """Write the batch to the store, from one process; every rank gets the row ids."""
        ids = [0] * len(experiences)
        if self.is_world_process_zero():
            ids = self._open_store().add(experiences)
        return broadcast_object_list([ids], from_process=0)[0]

    def _share_out(self, lessons: list[Lesson], *, prompts: int) -> None:
        """Deal lessons to ranks and accumulation steps, so that their weighted NLLs add up to lambda * mean.

        Each of the S micro-batches of a generation batch is divided by the accumulation steps when its loss is taken,
        and gradients are averaged over ranks; the weight undoes both.
        """
        rank, world = self._rank_and_world()
        steps = self.args.steps_per_generation
        mine = lessons[rank::world]
        self._shares = [
            tuple(lesson for j, lesson in enumerate(mine) if j * steps // len(mine) == s) for s in range(steps)
        ]
        denominator = len(lessons) if self.args.mel_normalization == "kept" else prompts
        self._lesson_weight = self.args.mel_weight * steps * world / max(1, denominator)

    # ---- Learn ----

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        start_s, before_s = time.monotonic(), sum(self._clock.seconds_s.values())
        loss = super().training_step(model, inputs, num_items_in_batch)
        phases_s = sum(self._clock.seconds_s.values()) - before_s
        self._clock.seconds_s["update"] += time.monotonic() - start_s - phases_s
        return loss

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        batch = super()._prepare_inputs(generation_batch)
        self.engine.sleep()
        if not self.model.training:
            return batch
        return {**batch, "lessons": self._shares[self._step % self.args.steps_per_generation]}

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """TRL's policy loss plus lambda * NLL of this micro-batch's lessons, both from one forward."""
        lessons: tuple[Lesson, ...] = inputs.get("lessons", ())
        self._riding = lessons
        policy_loss = super()._compute_loss(model, inputs)
        if self.model.training:
            self._log_metrics({"mel/policy_loss": policy_loss.item() * self.current_gradient_accumulation_steps})
        measured = self._measures_gradients()
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler.get_scale() if measured and scaler is not None else 1.0
        if measured:
            self._meter.add("policy", policy_loss, scale=scale)
        if not lessons:
            return policy_loss
        nlls = [-logp_T.mean() for logp_T in self._ridden_logps]
        weight = self._lesson_weight / self.current_gradient_accumulation_steps
        mel_loss = weight * torch.stack(nlls).sum()
        if measured:
            self._meter.add("nll", mel_loss, scale=scale)
        self._trained += [(lesson, nll.detach()) for lesson, nll in zip(lessons, nlls, strict=True)]
        return policy_loss + mel_loss

    def _measures_gradients(self) -> bool:
        every = self.args.grad_norm_every
        return bool(every) and torch.is_grad_enabled() and self.state.global_step % every == 0

    def _after_step(self) -> None:
        """After each optimiser step: gradient norms, and the NLL of its lessons before and after the update."""
        self._log_metrics(self._meter.drain(lambda t: self.accelerator.reduce(t, "mean")))
        trained, self._trained = self._trained, []
        after: list[torch.Tensor] = []
        if trained:
            lesson_rows = [self._lesson_row(lesson) for lesson, _ in trained]
            # One row at a time where they are long: training spread them over micro-batches, too.
            longest = max(len(row.ids) for row in lesson_rows)
            packed = pack(lesson_rows, pad_id=self._tokenizer.pad_token_id, max_tokens=longest)
            with self._clock("rescore"), evaluating(self.model), torch.no_grad(), self.accelerator.autocast():
                after, _ = score(self.model, packed)
        self._log_metrics(self._clock.drain())
        rows = gather_object(
            [
                (lesson.experience_id, before.item(), -logp_T.mean().item(), len(lesson.target_ids))
                for (lesson, before), logp_T in zip(trained, after, strict=True)
            ]
        )
        if not rows:
            return
        ids, before_nats, after_nats, tokens = (list(column) for column in zip(*rows, strict=True))
        if self.is_world_process_zero():
            self._open_store().set_nll(ids, before=before_nats, after=after_nats)
            self._open_store().set_trained(ids, tokens)
        self._log_metrics({"mel/nll": sum(before_nats) / len(ids), "mel/nll_after": sum(after_nats) / len(ids)})

    # ---- Shared ----

    @property
    def engine(self) -> MeteredEngine:
        """What samples from the policy; counts the tokens it generates."""
        assert self._engine is not None
        return self._engine

    @property
    def judge(self) -> Judge:
        """Who says whether a completion is right."""
        return self._judge

    @property
    def idle_batches(self) -> int:
        """Generation batches in a row without a mixed group: nothing to learn from."""
        return self._idle.idle_batches

    @property
    def idle_advice(self) -> str:
        """What is the likely reason for those, and what to change."""
        return self._idle.advice()

    def latest_sample(self) -> ExperienceRow | None:
        """The newest meta-experience, a kept one of the newest step if there is one."""
        if self._store is None:
            return None
        newest = self._store.list(limit=1)
        kept = self._store.list(status=Status.KEPT, step=newest[0].step, limit=1) if newest else []
        return next(iter(kept + newest), None)

    def _open_store(self) -> ExperienceStore:
        """The run's store, opened on first use so that a trainer that never trains leaves no file."""
        if self._store is None:
            self._store = ExperienceStore(Path(self.args.output_dir) / "experiences.sqlite")
        return self._store

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(float(value))

    def _rank_and_world(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes
