"""Scored proof: a lesson must make the right rollouts of its group likelier than the wrong ones. It costs no token."""

from __future__ import annotations

from collections.abc import Sequence

from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.prompts import question_prompt, replay_prompt
from mel_lite.types import Group, Lesson, Verdict


def score_shifts(items: Sequence[tuple[Group, str]], context: LessonContext) -> list[float | None]:
    """Return the shift of each (group, lesson text) in nats; above 0 the lesson favors the group's right rollouts.

    shift(M) = mean over right y of s(y) - mean over wrong y of s(y), with
    s(y) = sum_t log pi(y_t | x, M, y_<t) - log pi(y_t | x, y_<t), at the policy's temperature.

    Rollouts that the verifier abstained on do not count. None: the group is not mixed, or a rollout with M in its
    prompt does not fit the model's context.
    """
    scores = _Totals(context)
    return [scores.shift(group, text) for group, text in items]


class _Totals:
    """Log-probs of rollouts; those without a lesson are scored once per group."""

    def __init__(self, context: LessonContext) -> None:
        self._context = context
        self._plain: dict[int, list[float]] = {}

    def shift(self, group: Group, text: str) -> float | None:
        context = self._context
        tokenizer, kwargs = context.tokenizer, context.chat_template_kwargs
        if not group.is_mixed:
            return None
        prompt_ids = replay_prompt(group, text, tokenizer, context.templates, chat_template_kwargs=kwargs)
        judged = [r for r in group.rollouts if r.verdict is not Verdict.ABSTAIN]
        if len(prompt_ids) + max(len(r.completion_ids) for r in judged) > context.context_tokens:
            return None
        if id(group) not in self._plain:
            question_ids = question_prompt(group, tokenizer, chat_template_kwargs=kwargs)
            self._plain[id(group)] = self._totals(group, question_ids)
        gains = [a - b for a, b in zip(self._totals(group, prompt_ids), self._plain[id(group)], strict=True)]
        right = [gain for gain, r in zip(gains, judged, strict=True) if r.verdict is Verdict.RIGHT]
        wrong = [gain for gain, r in zip(gains, judged, strict=True) if r.verdict is Verdict.WRONG]
        return sum(right) / len(right) - sum(wrong) / len(wrong)

    def _totals(self, group: Group, prompt_ids: tuple[int, ...]) -> list[float]:
        texts = [Lesson(0, prompt_ids, r.completion_ids) for r in group.rollouts if r.verdict is not Verdict.ABSTAIN]
        assert self._context.scorer is not None, "scored proof reads with the policy"
        return [float(logp_T.double().sum()) for logp_T in self._context.scorer.logps(texts)]


__all__ = ["score_shifts"]
