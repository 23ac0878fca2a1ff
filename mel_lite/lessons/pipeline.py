"""Draw lessons from pairs with the current policy: analysis, parsing, leak guard, scored proof, replay, verdict.

pairs -> analyses -> parsed -> leak-free -> scored -> replayed -> kept or dropped, each with its reason
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mel_lite.lessons.analysis import write_analyses
from mel_lite.lessons.context import LessonContext
from mel_lite.lessons.fork import find_fork
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import ParseFailure, parse_analysis
from mel_lite.lessons.quotes import locate_quote
from mel_lite.lessons.replay import is_kept, replay
from mel_lite.lessons.scored import score_shifts
from mel_lite.models.chat import prompt_text
from mel_lite.types import Analysis, Experience, Finish, Pair, Replay, ReplayCriterion, Status


def draw_lessons(
    pairs: Sequence[Pair], context: LessonContext, *, step: int, batch: int
) -> tuple[list[Experience], list[tuple[Pair, str]]]:
    """Write, check and prove one meta-experience per pair.

    `step` is the optimizer step the experiences are recorded under, `batch` the generation batch that seeds count from.

    Returns: the experiences in pair order, each with its status; and the pairs whose solutions do not fit the context,
    with the reason.
    """
    criterion = ReplayCriterion(context.replay_criterion)
    with context.clock("analysis"):
        analyses, unfit = write_analyses(pairs, context, batch=batch)
    drawn = [checked(analysis, context, step) for analysis in analyses]
    if criterion.scores:
        with context.clock("scored"):
            drawn = prove_by_scores(drawn, context)
    if criterion.replays:
        with context.clock("replay"):
            drawn = _prove_by_replay(drawn, context, criterion, batch)
    return drawn, unfit


def prove_by_scores(drawn: Sequence[Experience], context: LessonContext) -> list[Experience]:
    """Drop what does not make the right rollouts of its group likelier than the wrong ones."""
    passed = [each for each in drawn if each.status is Status.KEPT]
    context.engine.sleep()  # scoring needs the memory
    shifts = iter(score_shifts([(each.analysis.pair.group, each.text) for each in passed], context))
    proved = []
    for each in drawn:
        if each.status is Status.KEPT:
            shift = next(shifts)
            each = replace(each, shift_nats=shift)
            if shift is None:
                reason = "the rollouts with it in their prompts do not fit the model's context"
                each = replace(each, status=Status.NOT_LIFTING, reason=reason)
            elif not shift > 0:
                reason = f"it lifts the right rollouts by {shift:+.2f} nats over the wrong ones, more than 0 needed"
                each = replace(each, status=Status.NOT_LIFTING, reason=reason)
        proved.append(each)
    return proved


def _prove_by_replay(
    drawn: Sequence[Experience], context: LessonContext, criterion: ReplayCriterion, batch: int
) -> list[Experience]:
    """Drop what does not help when the question is attempted again."""
    passed = [(each.analysis.pair, each.text) for each in drawn if each.status is Status.KEPT]
    if passed and criterion.scores:
        context.engine.wake()
    replays = iter(replay(passed, context, batch=batch))
    proved = []
    for each in drawn:
        if each.status is Status.KEPT:
            each = replayed(each, next(replays), criterion)
        proved.append(each)
    return proved


def replayed(experience: Experience, result: Replay, criterion: ReplayCriterion) -> Experience:
    """Return the experience with its replay; dropped when that does not meet the criterion."""
    kept, reason = is_kept(result, criterion)
    experience = replace(experience, replay=result)
    return experience if kept else replace(experience, status=Status.REPLAY_FAILED, reason=reason)


def checked(analysis: Analysis, context: LessonContext, step: int) -> Experience:
    """Parse and leak-check one analysis; one that passes is kept so far."""
    if analysis.finish is Finish.ENDED:
        assert context.hopeless is not None, "only then is an analysis ended early"
        return Experience(step, analysis, Status.UNPARSED, f"ended early: {context.hopeless(analysis.analysis_ids)}")
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
    return Experience(step, analysis, Status.KEPT, "", parsed, leak, quote=quote)
