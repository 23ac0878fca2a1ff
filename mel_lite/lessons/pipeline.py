"""Self-verification: from pairs to judged meta-experiences, every stage with the current policy.

pairs -> analyses -> parsed -> leak-free -> replayed -> kept or dropped, each with its reason
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mel_lite.engines.base import Engine, Sampling
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import ParseFailure, parse_analysis, write_analyses
from mel_lite.lessons.prompts import Templates
from mel_lite.lessons.replay import is_kept, replay
from mel_lite.types import Analysis, Experience, LeakReport, MetaExperience, Pair, Status
from mel_lite.verify.judge import Judge


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """How lessons are written and proven; field meanings as in `MELConfig`."""

    analysis: Sampling
    replay: Sampling
    max_context_tokens: int
    leak_policy: str
    train_on: str
    replay_attempts: int
    control: bool
    criterion: str
    run_seed: int
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Desk:
    """Who works on the lessons: the policy (through its engine), its tokenizer, the prompts and the judge."""

    engine: Engine
    tokenizer: Any
    templates: Templates
    judge: Judge
    options: StudyOptions
    clock: Callable[[str], AbstractContextManager[None]]
    """Opens a timed phase by name."""


@dataclass(frozen=True, slots=True)
class _Draft:
    """A meta-experience that passed the leak guard, and the text that is replayed."""

    analysis: Analysis
    parsed: MetaExperience
    leak: LeakReport

    @property
    def replayed(self) -> MetaExperience:
        return self.leak.redacted or self.parsed


def study(
    pairs: Sequence[Pair], desk: Desk, *, step: int, batch: int
) -> tuple[list[Experience], list[tuple[Pair, str]]]:
    """Write, check and replay one meta-experience per pair.

    `step` is the optimiser step the experiences are noted under, `batch` the generation batch their seeds count from.

    Returns: the experiences, in pair order and each with its status; and the pairs whose solutions do not fit the
    context, with the reason.
    """
    options = desk.options
    shared = {"engine": desk.engine, "tokenizer": desk.tokenizer, "templates": desk.templates, "step": batch}
    shared |= {"run_seed": options.run_seed, "chat_template_kwargs": options.chat_template_kwargs}
    with desk.clock("analysis"):
        analyses, unfit = write_analyses(
            pairs, sampling=options.analysis, max_context_tokens=options.max_context_tokens, **shared
        )
    checked = [_check(analysis, desk, step) for analysis in analyses]
    drafts = [draft for draft in checked if isinstance(draft, _Draft)]
    with desk.clock("replay"):
        replays = replay(
            [(draft.analysis.pair, draft.replayed.as_text()) for draft in drafts],
            judge=desk.judge,
            sampling=options.replay,
            attempts=options.replay_attempts,
            control=options.control,
            **shared,
        )
    proven = iter(replays)
    experiences = []
    for item in checked:
        if isinstance(item, Experience):
            experiences.append(item)
            continue
        result = next(proven)
        kept, reason = is_kept(result, options.criterion)
        status = Status.KEPT if kept else Status.REPLAY_FAILED
        experiences.append(
            Experience(step, item.analysis, status, "" if kept else reason, item.parsed, item.leak, result)
        )
    return experiences, unfit


def _check(analysis: Analysis, desk: Desk, step: int) -> _Draft | Experience:
    """Parse and leak-check one analysis: a draft worth replaying, or the experience it ends as."""
    try:
        parsed = parse_analysis(analysis.text, finish=analysis.finish, instructions=desk.templates.analysis_user)
    except ParseFailure as failure:
        return Experience(step, analysis, Status.UNPARSED, str(failure))
    group = analysis.pair.group
    question = group.prompt if isinstance(group.prompt, str) else "\n".join(m["content"] for m in group.prompt)
    leak = check_leak(
        parsed,
        answer=group.answer,
        right_text=analysis.pair.right.text,
        prompt_text=question,
        policy=desk.options.leak_policy,
        # What stands around the parsed parts is only a danger where it is trained on.
        raw_text=analysis.text if desk.options.train_on == "analysis" else None,
    )
    if leak.leaks and leak.redacted is None:
        return Experience(step, analysis, Status.LEAKED, leak.reasons[0], parsed, leak)
    return _Draft(analysis, parsed, leak)
