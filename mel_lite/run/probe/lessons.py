"""Draw and prove lessons for a probe: every one is replayed, resampled without it, and scored.

T tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mel_lite.config import MELConfig
from mel_lite.evaluate import bootstrap_interval
from mel_lite.intervals import Estimate
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.pairs import fork_token, select_pairs
from mel_lite.lessons.pipeline import draw_lessons
from mel_lite.lessons.prompts import question_prompt, replay_prompt
from mel_lite.lessons.replay import is_kept
from mel_lite.lessons.scored import score_shifts
from mel_lite.report.statistics import RESAMPLES, interval
from mel_lite.run.probe.result import Lessons
from mel_lite.types import Experience, Finish, Group, Lesson, ReplayCriterion, Status


@dataclass(frozen=True, slots=True)
class DrawnLessons:
    """Meta-experiences of one batch, with the status that the run's own criterion gives them."""

    experiences: tuple[tuple[int, Experience], ...]
    """Row id in the store and experience, in pair order."""
    pairs: int
    replay_tokens: int
    """Tokens of all replays, with and without the lesson."""


def draw(trainer: Any, groups: Sequence[Group], *, batch: int, attempts: int) -> DrawnLessons:
    """Write a batch's lessons like a training step does, but replay `attempts` times with and without each."""
    args: MELConfig = trainer.args
    pairs = select_pairs(
        groups, per_group=args.pairs_per_group, strategy=args.pair_strategy, run_seed=args.seed, step=batch
    )
    context = replace(
        trainer.lesson_context, replay_attempts=attempts, control=True, replay_criterion=ReplayCriterion.SOLVED.value
    )
    before = trainer.engine.total_generated_tokens
    trainer.engine.wake()
    experiences, _ = draw_lessons(pairs, context, step=0, batch=batch)
    trainer.engine.sleep()  # scoring needs the memory
    generated = trainer.engine.total_generated_tokens - before
    replayed = [each for each in experiences if each.replay is not None]
    shifts = score_shifts([(each.analysis.pair.group, each.text) for each in replayed], context)
    proved = iter([settled(each, s, args.replay_criterion) for each, s in zip(replayed, shifts, strict=True)])
    experiences = [next(proved) if each.replay is not None else each for each in experiences]
    row_ids = trainer.store.add(experiences)
    written = sum(len(each.analysis.analysis_ids) for each in experiences)
    return DrawnLessons(tuple(zip(row_ids, experiences, strict=True)), len(pairs), generated - written)


def settled(experience: Experience, shift_nats: float | None, criterion: str) -> Experience:
    """Return a replayed experience with its shift, kept or not by the run's own criterion."""
    assert experience.replay is not None, "it was replayed"
    wanted = ReplayCriterion(criterion)
    status, reason = Status.KEPT, ""
    if wanted.scores and not (shift_nats is not None and shift_nats > 0):
        status, reason = Status.NOT_LIFTING, "it does not lift the right rollouts over the wrong ones"
    elif wanted.replays:
        kept, why = is_kept(experience.replay, criterion)
        status, reason = (Status.KEPT, "") if kept else (Status.REPLAY_FAILED, why)
    return replace(experience, shift_nats=shift_nats, status=status, reason=reason)


def shift_from_fork(experiences: Sequence[Experience], context: LessonContext) -> tuple[float, float] | None:
    """Return the shares of shift and of tokens at and after the fork, over the wrong rollouts of all lessons' groups.

    shift = sum_t |log pi(y_t | M, x, y_<t) - log pi(y_t | x, y_<t)|, at the policy's temperature. The fork is where a
    rollout leaves its nearest right one. None when no wrong rollout fits the context with the lesson in its prompt.
    """
    late = total = 0.0
    late_tokens = tokens = 0
    kwargs = context.chat_template_kwargs
    assert context.scorer is not None, "a trainer's context has a scorer"
    for each in experiences:
        group = each.analysis.pair.group
        plain = question_prompt(group, context.tokenizer, chat_template_kwargs=kwargs)
        prompt = replay_prompt(group, each.text, context.tokenizer, context.templates, chat_template_kwargs=kwargs)
        room = context.context_tokens - len(prompt)
        wrong = [rollout for rollout in group.wrong if len(rollout.completion_ids) <= room]
        texts = [Lesson(0, ids, rollout.completion_ids) for ids in (prompt, plain) for rollout in wrong]
        assert context.scorer is not None, "a trainer's context has a scorer"
        logps = context.scorer.logps(texts)
        for rollout, with_T, without_T in zip(wrong, logps, logps[len(wrong) :], strict=False):
            fork = fork_token(group, rollout)
            shift_T = (with_T - without_T).abs().double()
            late, total = late + float(shift_T[fork:].sum()), total + float(shift_T.sum())
            late_tokens, tokens = late_tokens + len(shift_T[fork:]), tokens + len(shift_T)
    return (late / total, late_tokens / tokens) if total > 0 else None


def summary(
    drawn: Sequence[DrawnLessons], context: LessonContext, *, rollout_tokens: int, args: MELConfig, attempts: int
) -> Lessons:
    """Return the figures of all lessons; `rollout_tokens` are those of the same prompts."""
    every = [each for batch in drawn for _, each in batch.experiences]
    replays = [each.replay for each in every if each.replay is not None]
    shifts = [each.shift_nats for each in every if each.shift_nats is not None]
    uplifts = [replay.uplift for replay in replays if replay.uplift is not None]
    late = shift_from_fork([each for each in every if each.shift_nats is not None], context)
    tokens = sum(len(each.analysis.analysis_ids) for each in every)
    if ReplayCriterion(args.replay_criterion).replays:
        share = args.replay_attempts * (1 + args.needs_control) / (2 * attempts)
        tokens += round(share * sum(batch.replay_tokens for batch in drawn))
    parsed = sum(each.parsed is not None for each in every)
    return Lessons(
        pairs=sum(batch.pairs for batch in drawn),
        written=len(every),
        cut_off=sum(each.analysis.finish is Finish.LENGTH for each in every),
        parsed=parsed,
        quoted=sum(each.quote is not None for each in every),
        leaked=sum(each.status is Status.LEAKED for each in every),
        kept=sum(each.status is Status.KEPT for each in every),
        replayed=len(replays),
        solved=_mean([replay.solved_rate for replay in replays]),
        resampled=_mean([replay.control_rate for replay in replays if replay.control_rate is not None]),
        uplift=interval(np.array([uplifts])) if uplifts else None,
        shift_nats=_mean_nats(shifts, args.seed),
        shift_from_fork=None if late is None else late[0],
        tokens_from_fork=None if late is None else late[1],
        token_share=tokens / max(1, tokens + rollout_tokens),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean_nats(values: Sequence[float], seed: int) -> Estimate | None:
    """Return the mean with its interval, which has no width for a single value."""
    if not values:
        return None
    found = bootstrap_interval(values, resamples=RESAMPLES, seed=seed)
    return Estimate(found.value, found.low, found.high)


__all__ = ["DrawnLessons", "draw", "settled", "shift_from_fork", "summary"]
