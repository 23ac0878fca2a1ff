"""Replay validation: retry the question with the meta-experience in the prompt, and keep what helps."""

from __future__ import annotations

from collections.abc import Sequence

from mel_lite.engines.base import Request
from mel_lite.errors import ConfigError, EngineError, check_choice
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.prompts import question_prompt, replay_prompt
from mel_lite.seeds import seed_for
from mel_lite.types import Group, Pair, Replay, ReplayCriterion, Verdict


def replay(items: Sequence[tuple[Pair, str]], context: LessonContext, *, batch: int) -> list[Replay]:
    """Sample y_val ~ pi(. | x, M) `replay_attempts` times for each (pair, M as text), and judge the answers.

    With `control` the same number of attempts is made on x alone. Attempt i uses the same seed with and without M, so
    the two differ in M only. One `engine.generate` call and one `judge` call serve all items.

    Returns: one Replay per item, in order.
    Raises: ConfigError for `replay_attempts` below 1; EngineError when the engine returns another number of completions
    than were requested. Source: step 3 of the method (arXiv 2602.10224).
    """
    attempts, tokenizer, engine = context.replay_attempts, context.tokenizer, context.engine
    kwargs = context.chat_template_kwargs
    if attempts < 1:
        raise ConfigError(f"replay_attempts={attempts} must be 1 or more: without a replay nothing is validated.")
    if not items:
        return []
    requests: list[Request] = []
    groups: list[Group] = []
    for pair, text in items:
        group = pair.group
        prompts = [replay_prompt(group, text, tokenizer, context.templates, chat_template_kwargs=kwargs)]
        if context.control:
            prompts.append(question_prompt(group, tokenizer, chat_template_kwargs=kwargs))
        seeds = [
            seed_for(context.run_seed, step=batch, prompt_hash=group.prompt_hash, index=index, purpose="replay")
            for index in range(pair.index * attempts, (pair.index + 1) * attempts)
        ]
        requests += [Request(prompt, seed) for prompt in prompts for seed in seeds]
        groups += [group] * (len(prompts) * attempts)
    completions = engine.generate(requests, context.replay)
    if len(completions) != len(requests):
        raise EngineError(f"engine {engine.name!r} answered {len(completions)} of {len(requests)} replay requests.")
    texts = [str(tokenizer.decode(list(each.ids), skip_special_tokens=True)) for each in completions]
    verdicts = context.judge(groups, texts)
    assert len(verdicts) == len(texts), "the judge gives one verdict per text"
    stride = attempts * (2 if context.control else 1)
    return [
        Replay(
            verdicts=tuple(verdicts[start : start + attempts]),
            texts=tuple(texts[start : start + attempts]),
            control_verdicts=tuple(verdicts[start + attempts : start + stride]),
        )
        for start in range(0, len(texts), stride)
    ]


def is_kept(replay: Replay, criterion: str) -> tuple[bool, str]:
    """Decide by a ReplayCriterion whether M belongs to M*; returns the decision and its reason in one sentence.

    Attempts the verifier abstained on count as not right. Raises: ConfigError for an unknown criterion, or `uplift`
    without a control.
    """
    check_choice("replay_criterion", criterion, ReplayCriterion)
    right = sum(verdict is Verdict.RIGHT for verdict in replay.verdicts)
    with_m = f"{right} of {len(replay.verdicts)} replays right"
    if not ReplayCriterion(criterion).compares:
        return replay.solved_rate > 0.5, f"{with_m}, more than half needed"
    if replay.uplift is None:
        raise ConfigError(f"replay_criterion={str(criterion)!r} needs the control attempts. Set replay_control=True.")
    control_right = sum(verdict is Verdict.RIGHT for verdict in replay.control_verdicts)
    without = f"{control_right} of {len(replay.control_verdicts)} without the meta-experience"
    return replay.uplift > 0, f"{with_m}, {without}; more than without needed"


__all__ = ["is_kept", "replay"]
