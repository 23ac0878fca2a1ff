"""Replay validation: retry the question with the meta-experience in the prompt, and keep what helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mel_lite.engines.base import Completion, Request
from mel_lite.errors import ConfigError, EngineError, check_choice
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.prompts import question_prompt, replay_prompt
from mel_lite.seeds import seed_for
from mel_lite.types import Pair, Replay, ReplayCriterion, Verdict

NOTHING = Replay((), ())
"""A replay before its first attempt."""


def replay(items: Sequence[tuple[Pair, str]], context: LessonContext, *, batch: int) -> list[Replay]:
    """Sample y_val ~ pi(. | x, M) `replay_attempts` times for each (pair, M as text), and judge the answers.

    With `control` the same number of attempts is made on x alone. Attempt i uses the same seed with and without M, so
    the two differ in M only. One `engine.generate` call and one `judge` call serve all items; where the first right
    answer decides (`one_after_another`), one of each per attempt.

    Returns: one Replay per item, in order.
    Raises: ConfigError for `replay_attempts` below 1; EngineError when the engine returns another number of completions
    than were requested. Source: step 3 of the method (arXiv 2602.10224).
    """
    replays = [NOTHING] * len(items)
    while True:
        asked = [
            next_attempts(pair, text, done, context, batch=batch)
            for (pair, text), done in zip(items, replays, strict=True)
        ]
        requests = [request for each in asked for request in each]
        if not requests:
            return replays
        completions = context.engine.generate(requests, context.replay)
        if len(completions) != len(requests):
            name = context.engine.name
            raise EngineError(f"engine {name!r} answered {len(completions)} of {len(requests)} replay requests.")
        answers = iter(completions)
        attempts = [
            (pair, done, [next(answers) for _ in each])
            for (pair, _), done, each in zip(items, replays, asked, strict=True)
        ]
        replays = judge_attempts(attempts, context)


def one_after_another(context: LessonContext) -> bool:
    """Return True when each attempt waits for the verdict on the one before: the first right answer ends them."""
    return ReplayCriterion(context.replay_criterion).needs_one and not context.control


def next_attempts(pair: Pair, text: str, done: Replay, context: LessonContext, *, batch: int) -> list[Request]:
    """Return the attempts to make next: all, with controls, or the next one; none when the replay is complete.

    Raises: ConfigError for `replay_attempts` below 1.
    """
    attempts, group = context.replay_attempts, pair.group
    if attempts < 1:
        raise ConfigError(f"replay_attempts={attempts} must be 1 or more: without a replay nothing is validated.")
    made, single = len(done.verdicts), one_after_another(context)
    if made == attempts or (single and Verdict.RIGHT in done.verdicts):
        return []
    kwargs = context.chat_template_kwargs
    prompts = [replay_prompt(group, text, context.tokenizer, context.templates, chat_template_kwargs=kwargs)]
    if context.control:
        prompts.append(question_prompt(group, context.tokenizer, chat_template_kwargs=kwargs))
    seeds = [
        seed_for(context.run_seed, step=batch, prompt_hash=group.prompt_hash, index=index, purpose="replay")
        for index in range(pair.index * attempts + made, (pair.index + 1) * attempts)
    ]
    return [Request(prompt, seed, context.replay) for prompt in prompts for seed in (seeds[:1] if single else seeds)]


def judge_attempts(
    attempts: Sequence[tuple[Pair, Replay, Sequence[Completion]]], context: LessonContext
) -> list[Replay]:
    """Return each replay with the sampled attempts judged and added; those without M come last. One `judge` call."""
    groups = [pair.group for pair, _, sampled in attempts for _ in sampled]
    sampled_ids = [each.ids for _, _, sampled in attempts for each in sampled]
    texts = [str(context.tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in sampled_ids]
    verdicts = context.judge(groups, texts) if texts else []
    assert len(verdicts) == len(texts), "the judge gives one verdict per text"
    replays, start = [], 0
    for _, done, sampled in attempts:
        with_m = start + len(sampled) // (2 if context.control else 1)
        end = start + len(sampled)
        replays.append(
            replace(
                done,
                verdicts=(*done.verdicts, *verdicts[start:with_m]),
                texts=(*done.texts, *texts[start:with_m]),
                control_verdicts=(*done.control_verdicts, *verdicts[with_m:end]),
            )
        )
        start = end
    return replays


def is_kept(replay: Replay, criterion: str) -> tuple[bool, str]:
    """Decide by a ReplayCriterion whether M belongs to M*; returns the decision and its reason in one sentence.

    Attempts the verifier abstained on count as not right. Raises: ConfigError for an unknown criterion, or `uplift`
    without a control.
    """
    check_choice("replay_criterion", criterion, ReplayCriterion)
    right = sum(verdict is Verdict.RIGHT for verdict in replay.verdicts)
    with_m = f"{right} of {len(replay.verdicts)} replays right"
    if ReplayCriterion(criterion).needs_one:
        return right > 0, f"{with_m}, one needed"
    if not ReplayCriterion(criterion).compares:
        return replay.solved_rate > 0.5, f"{with_m}, more than half needed"
    if replay.uplift is None:
        raise ConfigError(f"replay_criterion={str(criterion)!r} needs the control attempts. Set replay_control=True.")
    control_right = sum(verdict is Verdict.RIGHT for verdict in replay.control_verdicts)
    without = f"{control_right} of {len(replay.control_verdicts)} without the meta-experience"
    return replay.uplift > 0, f"{with_m}, {without}; more than without needed"


__all__ = ["NOTHING", "is_kept", "judge_attempts", "next_attempts", "one_after_another", "replay"]
