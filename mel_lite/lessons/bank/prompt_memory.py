"""Evaluate lessons as a memory in the prompt: each question with the lessons that match it, and without, paired."""

from __future__ import annotations

import functools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mel_lite.engines.base import Engine
from mel_lite.evaluate import EvalResult, Interval, PromptScore, bootstrap_interval, evaluate
from mel_lite.intervals import widened
from mel_lite.lessons.bank.bank import LessonBank, notes_text
from mel_lite.lessons.prompts import Templates, replay_prompt
from mel_lite.models.chat import question_text, render, render_tasks
from mel_lite.verify.judge import Judge, answer_column, group_of

if TYPE_CHECKING:
    import datasets
    from rich.table import Table

MEASURES = {"pass_at_1": "Pass@1 (greedy)", "avg_at_k": "Avg@{k}"}
"""Measures that are a mean over prompts of what one prompt's answers give, so that they can be paired."""


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """Results with and without lessons in the prompt, on the same tasks and seeds."""

    plain: EvalResult
    with_lessons: EvalResult
    difference: Mapping[str, Interval]
    """With lessons minus without, by measure, with a bootstrap interval over the prompts that both count."""
    taught_difference: Mapping[str, Interval]
    """The same over the prompts with at least one lesson; empty when there is none."""
    tasks: int
    taught: int
    """Number of tasks asked with at least one lesson. The others are asked without, in both columns."""
    over_context: int
    """Number of tasks whose lessons did not fit the model's context, asked without them."""
    lessons_per_task: float
    """Mean number of lessons of a taught task."""

    def to_json(self) -> str:
        """Return all fields as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    def as_table(self) -> Table:
        """Render both results and their differences as a rich table."""
        from rich.table import Table

        over = f"; the lessons of {self.over_context} more do not fit the context" if self.over_context else ""
        table = Table(
            title="evaluation with lessons in the prompt",
            caption=f"{self.taught} of {self.tasks} tasks have lessons, {self.lessons_per_task:.1f} each{over}. "
            f"{self.with_lessons.conditions()}",
        )
        for heading in ("measure", "plain", "with lessons", "difference", "of tasks with lessons"):
            table.add_column(heading, justify="left" if heading == "measure" else "right")
        for name, label in MEASURES.items():
            both = [str(getattr(result, name)) for result in (self.plain, self.with_lessons)]
            shifts = [_signed(found[name]) if found else "" for found in (self.difference, self.taught_difference)]
            table.add_row(label.format(k=self.plain.k), *both, *shifts)
        return table


def _signed(shift: Interval) -> str:
    return f"{100 * shift.value:+.1f} [{100 * shift.low:+.1f}, {100 * shift.high:+.1f}] points"


def evaluate_with_lessons(
    engine: Engine,
    tokenizer: Any,
    tasks: datasets.Dataset,
    judge: Judge,
    *,
    bank: LessonBank,
    templates: Templates,
    max_new_tokens: int = 1024,
    chat_template_kwargs: dict[str, Any] | None = None,
    context_tokens: int | None = None,
    seed: int = 42,
    bootstrap: int = 2000,
    limit: int | None = None,
    **options: Any,
) -> MemoryResult:
    """Evaluate as `evaluate` does, without lessons and with those that the bank retrieves for each question.

    Lessons enter by the template of replays. Both evaluations use the same seeds, so that a task without lessons has
    the same answers in both. Raises: as `evaluate`; DataError for a conversation without a user turn.
    """
    tasks = tasks if limit is None else tasks.select(range(min(limit, len(tasks))))
    asked = lesson_prompts(
        tasks, tokenizer, bank, templates, max_new_tokens=max_new_tokens, context_tokens=context_tokens,
        chat_template_kwargs=chat_template_kwargs,
    )  # fmt: skip
    without, taught = (
        evaluate(
            engine, tokenizer, tasks, judge, prompts=prompts, max_new_tokens=max_new_tokens, seed=seed,
            context_tokens=context_tokens, **options,
        )
        for prompts in (asked.plain, asked.taught)
    )  # fmt: skip
    have_lessons = {prompt_hash for prompt_hash, _ in asked.counts}
    pairs = _pairs(without.scores, taught.scores)
    shift = functools.partial(_difference, samples=without.samples, resamples=bootstrap, seed=seed)
    return MemoryResult(
        without,
        taught,
        difference=shift(pairs),
        taught_difference=shift([pair for pair in pairs if pair[0].prompt_hash in have_lessons]),
        tasks=len(tasks),
        taught=len(asked.counts),
        over_context=asked.over_context,
        lessons_per_task=sum(count for _, count in asked.counts) / max(1, len(asked.counts)),
    )


@dataclass(frozen=True, slots=True)
class LessonPrompts:
    """Prompts of tasks as token ids, without lessons and with those that the bank retrieves."""

    plain: list[tuple[int, ...]]
    taught: list[tuple[int, ...]]
    """Equal to `plain` for a task without lessons, or with lessons that do not fit the context."""
    counts: list[tuple[str, int]]
    """Hash and number of lessons of each task with lessons."""
    over_context: int
    """Number of tasks whose lessons do not fit."""


def lesson_prompts(
    tasks: datasets.Dataset,
    tokenizer: Any,
    bank: LessonBank,
    templates: Templates,
    *,
    max_new_tokens: int,
    chat_template_kwargs: dict[str, Any] | None = None,
    context_tokens: int | None = None,
) -> LessonPrompts:
    """Return the prompts of tasks. Raises: DataError for a conversation without a user turn."""
    column = answer_column(tasks.column_names)
    groups = [group_of(row, column) for row in tasks]
    as_ids = functools.partial(render, tokenizer=tokenizer, chat_template_kwargs=chat_template_kwargs)
    plain = list(render_tasks((group.prompt for group in groups), as_ids, "evaluation tasks"))
    room_tokens = math.inf if context_tokens is None else context_tokens - max_new_tokens
    taught, counts, over_context = list(plain), [], 0
    for i, group in enumerate(groups):
        found = bank.retrieve(question_text(group.prompt))
        notes = notes_text(found)
        if found:
            ids = replay_prompt(group, notes, tokenizer, templates, chat_template_kwargs=chat_template_kwargs)
            if len(ids) > room_tokens:
                over_context += len(plain[i]) <= room_tokens
                continue
            taught[i] = ids
            counts.append((group.prompt_hash, len(found)))
    return LessonPrompts(plain, taught, counts, over_context)


def _pairs(plain: Sequence[PromptScore], taught: Sequence[PromptScore]) -> list[tuple[PromptScore, PromptScore]]:
    """Pair the scores of each prompt; a prompt that occurs n times is paired in order."""
    later: defaultdict[str, list[PromptScore]] = defaultdict(list)
    for score in reversed(taught):
        later[score.prompt_hash].append(score)
    return [(score, later[score.prompt_hash].pop()) for score in plain if later[score.prompt_hash]]


def _difference(
    pairs: Sequence[tuple[PromptScore, PromptScore]], *, samples: int, resamples: int, seed: int
) -> dict[str, Interval]:
    if not pairs:
        return {}
    per_prompt = {
        "pass_at_1": [float(b.greedy_right) - float(a.greedy_right) for a, b in pairs],
        "avg_at_k": [(b.samples_right - a.samples_right) / samples for a, b in pairs],
    }
    found = {}
    for name, values in per_prompt.items():
        plain = bootstrap_interval(values, resamples=resamples, seed=seed)
        honest = widened(plain.value, plain.low, plain.high, len(values))
        found[name] = Interval(honest.value, honest.low, honest.high)
    return found


__all__ = ["MemoryResult", "evaluate_with_lessons", "lesson_prompts"]
