"""Meta-experiences as a report shows them: both solutions with the fork and the quoted step marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mel_lite.lessons.fork import find_fork
from mel_lite.lessons.quotes import locate_quote
from mel_lite.lessons.store import ExperienceRow
from mel_lite.models.chat import question_text
from mel_lite.report.credit import CreditStrip
from mel_lite.text import printable, shorten
from mel_lite.types import Span, Status, Verdict

MOST_CHARACTERS = 6000
"""Longer texts are cut in the page."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text and the classes that mark it."""

    text: str
    classes: str = ""


@dataclass(frozen=True, slots=True)
class LessonView:
    """One meta-experience, ready for the page. All texts are free of control characters."""

    id: int
    step: int
    """Step in which it was complete, from 1."""
    rollouts_step: int
    """Step that sampled its rollouts; the same with the strict schedule."""
    status: str
    status_text: str
    question: str
    answer: str | None
    right: tuple[Segment, ...]
    wrong: tuple[Segment, ...]
    quote: str
    """Sentence on the step of the wrong solution that the bifurcation quotes."""
    common_prefix_tokens: int
    parts: tuple[tuple[str, str], ...]
    """Title and text of bifurcation, critique and heuristic; of the raw analysis when it was not parsed."""
    heuristic: str
    reason: str
    leaks: tuple[str, ...]
    redacted: bool
    replays: tuple[tuple[str, str], ...]
    """Verdict and text of each replay with it."""
    controls: tuple[str, ...]
    """Verdict of each attempt without it, on the same seeds."""
    replay_line: str
    nll_before: float | None
    nll_after: float | None
    nll_written: float | None
    credit: tuple[CreditStrip, ...]
    """Token credit of its rollouts; empty where none is stored."""


def status_text(status: Status) -> str:
    """Return a status as readers see it."""
    return status.value.replace("_", " ")


def view(row: ExperienceRow, credit: tuple[CreditStrip, ...] = ()) -> LessonView:
    """Return a row of the store, and the token credit of its rollouts, as the page shows them."""
    fork = find_fork(row.right_text, row.wrong_text)
    quote = locate_quote(row.bifurcation or "", row.wrong_text, fork=fork.wrong)
    if row.quote_start is not None and row.quote_end is not None:
        quote = Span(row.quote_start, row.quote_end)
    parsed = [(name, _text(getattr(row, name))) for name in ("bifurcation", "critique", "heuristic")]
    parts = [(name.capitalize(), text) for name, text in parsed if text] or [("Analysis", _text(row.analysis))]
    return LessonView(
        id=row.id,
        step=row.step,
        rollouts_step=row.rollouts_step,
        status=row.status.value,
        status_text=status_text(row.status),
        question=_text(question_text(row.prompt)),
        answer=None if row.answer is None else _text(row.answer),
        right=marked(row.right_text, fork.right, None),
        wrong=marked(row.wrong_text, fork.wrong, quote),
        quote=_about_quote(quote, fork.wrong, parsed=row.heuristic is not None),
        common_prefix_tokens=row.common_prefix_tokens,
        parts=tuple(parts),
        heuristic=shorten(" ".join(_text(row.heuristic).split()), 200),
        reason=_text(row.reason),
        leaks=tuple(_text(reason) for reason in row.leak_reasons if reason != row.reason),
        redacted=row.redacted,
        replays=tuple(
            (verdict.value, _text(text)) for verdict, text in zip(row.replay_verdicts, row.replay_texts, strict=False)
        ),
        controls=tuple(verdict.value for verdict in row.control_verdicts),
        replay_line=replay_line(row.replay_verdicts, row.control_verdicts),
        nll_before=row.nll_before,
        nll_after=row.nll_after,
        nll_written=row.nll_written,
        credit=credit,
    )


def _about_quote(quote: Span | None, fork: Span, *, parsed: bool) -> str:
    if quote is None:
        return "The lesson quotes no step of the wrong solution." if parsed else ""
    if quote.start < max(fork.end, fork.start + 1) and fork.start < quote.end:
        return "The lesson quotes the step where they part (underlined)."
    return "The lesson quotes another step than the one where they part (underlined)."


def _text(text: str | None) -> str:
    cleaned = printable(text or "")
    return cleaned if len(cleaned) <= MOST_CHARACTERS else cleaned[:MOST_CHARACTERS] + " [cut here]"


def marked(text: str, fork: Span, quote: Span | None) -> tuple[Segment, ...]:
    """Cut a text where its marks begin and end. What comes before the fork has the class `same`.

    A fork after the end of the text, where the other solution continues, is a segment that says so.
    """
    shown = _text(text)  # as many characters as before, up to a cut
    marks = [("same", Span(0, fork.start)), ("fork", fork), *([("quoted", quote)] if quote else [])]
    ends = {min(end, len(shown)) for _, span in marks for end in (span.start, span.end)}
    segments = [
        Segment(shown[a:b], " ".join(name for name, span in marks if span.start <= a and b <= span.end))
        for a, b in pairwise(sorted({0, len(shown), *ends}))
    ]
    if fork.start == fork.end:
        at = next((i for i, segment in enumerate(segments) if segment.classes == ""), len(segments))
        segments.insert(at, Segment("(ends here)", "fork"))
    return tuple(segments)


def replay_line(verdicts: Sequence[Verdict], controls: Sequence[Verdict]) -> str:
    """Return the outcome of the replays in words; empty without one."""
    if not verdicts:
        return ""

    def solved(each: Sequence[Verdict]) -> str:
        return f"{sum(verdict is Verdict.RIGHT for verdict in each)} of {len(each)}"

    without = f", without it {solved(controls)}" if controls else ""
    return f"solved {solved(verdicts)} with it{without}"


def chosen(rows: Sequence[ExperienceRow], most: int) -> list[ExperienceRow]:
    """Return at most `most` rows, newest first: kept ones before the others where not all have room.

    A quarter of the places is for the dropped ones.
    """
    if len(rows) > most:
        kept = [row for row in rows if row.status is Status.KEPT]
        dropped = [row for row in rows if row.status is not Status.KEPT]
        room = max(most - len(kept), min(len(dropped), most // 4))
        rows = [*kept[len(kept) - min(len(kept), most - room) :], *dropped[len(dropped) - min(len(dropped), room) :]]
    return sorted(rows, key=lambda row: row.id, reverse=True)
