"""Draw lessons from pairs with the current policy: analysis, parsing, leak guard, replay, verdict.

pairs -> analyses -> parsed -> leak-free -> replayed -> kept or dropped, each with its reason
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mel_lite.lessons.analysis import write_analyses
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.fork import find_fork
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import ParseFailure, parse_analysis
from mel_lite.lessons.quotes import locate_quote
from mel_lite.lessons.replay import is_kept, replay
from mel_lite.models.chat import prompt_text
from mel_lite.types import Analysis, Experience, LeakReport, MetaExperience, Pair, Span, Status


@dataclass(frozen=True, slots=True)
class CheckedAnalysis:
    """A meta-experience that passed the leak guard, ready for replay."""

    analysis: Analysis
    parsed: MetaExperience
    leak: LeakReport
    quote: Span | None

    @property
    def text(self) -> str:
        """The text that is replayed: M, redacted where the guard did so."""
        return (self.leak.redacted or self.parsed).as_text()


def draw_lessons(
    pairs: Sequence[Pair], context: LessonContext, *, step: int, batch: int
) -> tuple[list[Experience], list[tuple[Pair, str]]]:
    """Write, check and replay one meta-experience per pair.

    `step` is the optimizer step the experiences are recorded under, `batch` the generation batch that seeds count from.

    Returns: the experiences in pair order, each with its status; and the pairs whose solutions do not fit the context,
    with the reason.
    """
    with context.clock("analysis"):
        analyses, unfit = write_analyses(pairs, context, batch=batch)
    checked = [_check(analysis, context, step) for analysis in analyses]
    passed = [item for item in checked if isinstance(item, CheckedAnalysis)]
    with context.clock("replay"):
        replays = iter(replay([(item.analysis.pair, item.text) for item in passed], context, batch=batch))
    experiences = []
    for item in checked:
        if isinstance(item, Experience):
            experiences.append(item)
            continue
        result = next(replays)
        kept, reason = is_kept(result, context.replay_criterion)
        status = Status.KEPT if kept else Status.REPLAY_FAILED
        experiences.append(
            Experience(step, item.analysis, status, "" if kept else reason, item.parsed, item.leak, result, item.quote)
        )
    return experiences, unfit


def _check(analysis: Analysis, context: LessonContext, step: int) -> CheckedAnalysis | Experience:
    """Parse and leak-check one analysis; return it for replay, or the experience it ends as."""
    try:
        instructions = context.templates.instructions(marked=context.mark_fork)
        parsed = parse_analysis(analysis.text, finish=analysis.finish, instructions=instructions)
    except ParseFailure as failure:
        return Experience(step, analysis, Status.UNPARSED, str(failure))
    group, right, wrong = analysis.pair.group, analysis.pair.right.text, analysis.pair.wrong.text
    fork = find_fork(right, wrong).wrong
    quote = locate_quote(parsed.bifurcation, wrong, fork=fork, mark=context.templates.fork_mark)
    leak = check_leak(
        parsed,
        answer=group.answer,
        right_text=right,
        prompt_text=prompt_text(group.prompt),
        policy=context.leak_policy,
        raw_text=analysis.text if context.trains_whole_analysis else None,
    )
    if leak.leaks and leak.redacted is None:
        return Experience(step, analysis, Status.LEAKED, leak.reasons[0], parsed, leak, quote=quote)
    return CheckedAnalysis(analysis, parsed, leak, quote)
