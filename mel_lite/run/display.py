"""Tables, panels and lines that show plans, steps, meta-experiences and summaries in a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mel_lite.lessons.store import ExperienceRow
from mel_lite.memory.formulas import GIB
from mel_lite.memory.plan import Plan
from mel_lite.models.chat import question_text
from mel_lite.report.figures import FUNNEL, evaluation
from mel_lite.report.terminal import STATUS_STYLE, labeled, one_line
from mel_lite.types import BankLesson

if TYPE_CHECKING:
    from mel_lite.evaluate import EvalResult
    from mel_lite.resilience.worst_step import PhasePeak

PHASES = {
    "probe": "engine check", "forks": "check of forks", "scored": "scoring of lessons", "examine": "re-examination",
    "internalise": "scoring with notes", "rescore": "scoring after the update",
}  # fmt: skip
"""Phases that are shown under another name than the clock's."""
PARTS = {
    "rollout": "completions", "verify": "answers", "analysis": "analyses", "replay": "replays", "evaluation": "answers",
    "update": "parts",
}  # fmt: skip
"""Name of a phase's parts."""


def phase_text(phase: str, total: int, done: int | None = None) -> str:
    """Return a phase by name with its number of parts, such as `rollout 24/64 completions` or `rollout: 64 ...`."""
    name, parts = PHASES.get(phase, phase), PARTS.get(phase, "parts")
    if not total:
        return name
    return f"{name}: {total:,} {parts}" if done is None else f"{name} {done:,}/{total:,} {parts}"


def progress_bar(share: float, cells: int = 20) -> str:
    """Return a bar of which a share in [0, 1] is filled."""
    filled = round(cells * min(1.0, max(0.0, share)))
    return "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * filled + "\N{BOX DRAWINGS LIGHT HORIZONTAL}" * (cells - filled)


def flowed(parts: Sequence[str], width: int, separator: str, *, indent: int) -> list[str]:
    """Join the parts to lines of at most `width` characters, broken between parts where possible.

    Lines after the first are indented. A word longer than a line stays whole.
    """
    lines: list[str] = []
    for part in filter(None, parts):
        if lines and len(lines[-1]) + len(separator) + len(part) <= width:
            lines[-1] += separator + part
            continue
        first = " " * indent if lines else ""
        lines += textwrap.wrap(
            part, max(width, 2 * indent), initial_indent=first, subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines


def step_parts(step: int, max_steps: int, logs: dict[str, Any]) -> list[str]:
    """Return the parts of a line about a step, with the name of each figure. Missing metrics are omitted."""

    def metric(name: str, text: str) -> str:
        value = logs.get(name)
        return "" if value is None else text.format(value)

    def several(*parts: str, start: str = "") -> str:
        found = ", ".join(part for part in parts if part)
        return f"{start}{found}" if found else ""

    norms = several(
        metric("mel/grad_norm_policy", "policy {:.3f}"),
        metric("mel/grad_norm_nll", "lessons {:.3f}"),
        start="gradient ",
    )
    parts = [
        f"step {step:>{len(str(max_steps))}}/{max_steps}",
        several(metric("mel/pass_rate", "{:.0%} right"), metric("reward", "reward {:.2f}")),
        _lessons_part(logs),
        several(
            metric("mel/policy_loss", "policy loss {:+.4f}") or metric("loss", "loss {:+.4f}"),
            metric("mel/nll", "lessons' NLL {:.3f}") + metric("mel/nll_after", " to {:.3f}"),
        ),
        norms or metric("grad_norm", "gradient {:.3f}"),
        several(metric("mel/tokens_per_s", "{:.0f} tokens/s"), metric("mel/peak_memory_gib", "peak {:.1f} GiB")),
    ]
    return [part for part in parts if part]


def _lessons_part(logs: dict[str, Any]) -> str:
    """Return how many groups gave how many lessons, and their effect in the prompt."""
    if "mel/groups" not in logs:
        return ""
    counts = {
        stage: f"{logs.get(f'mel/{stage}', 0.0):g}" for stage in ("replay_valid", "pairs", "mixed_groups", "groups")
    }
    text = "{replay_valid} of {pairs} lessons kept, {mixed_groups} of {groups} groups mixed".format(**counts)
    if not logs.get("mel/pairs"):
        text = "{mixed_groups} of {groups} groups mixed".format(**counts)
    uplift = logs.get("mel/replay_uplift")
    return text if uplift is None else f"{text}, uplift {100 * uplift:+.0f} points"


def sample_panel(row: ExperienceRow) -> RenderableType:
    """Render one meta-experience in brief, with the rollouts that it compares."""
    parts: list[RenderableType] = [
        labeled("question", one_line(question_text(row.prompt), 300)),
        labeled("wrong", one_line(row.wrong_text, 300), "red"),
        labeled("right", one_line(row.right_text, 300), "green"),
    ]
    if row.heuristic is None:
        parts.append(labeled("analysis", one_line(row.analysis, 400)))
    else:
        for name in ("bifurcation", "critique", "heuristic"):
            parts.append(labeled(name, one_line(getattr(row, name), 400), "cyan"))
    if row.replay_verdicts:
        replayed = ", ".join(row.replay_verdicts)
        control = f" (without it: {', '.join(row.control_verdicts)})" if row.control_verdicts else ""
        parts.append(labeled("replay", Text(replayed + control)))
    if row.nll_before is not None and row.nll_after is not None:
        parts.append(labeled("NLL", Text(f"{row.nll_before:.3f} > {row.nll_after:.3f} nats/token by its update")))
    if row.reason:
        parts.append(labeled("dropped", one_line(row.reason, 300), "yellow"))
    title = f"meta-experience {row.id}, step {row.step}: {row.status}"
    return Panel(Group(*parts), title=title, title_align="left", border_style=STATUS_STYLE[row.status])


def bank_table(lessons: Sequence[BankLesson], truths: Sequence[bool | None] | None) -> Table:
    """Render the lessons of a bank, one per line, with the truth of each where it is known."""
    table = Table("id", "score", "votes", "state", "step", show_lines=False)
    if truths is not None:
        table.add_column("true")
    table.add_column("heuristic")
    for number, lesson in enumerate(lessons):
        state = Text("retired", style="yellow") if lesson.retired else Text("active", style="green")
        step = str(lesson.step) if lesson.step else ""
        known = [] if truths is None else [{True: "yes", False: "no", None: "?"}[truths[number]]]
        score, rule = f"{lesson.score:.2f}", one_line(lesson.heuristic, 110)
        table.add_row(str(lesson.id), score, str(lesson.votes), state, step, *known, rule)
    return table


def bank_line(lessons: Sequence[BankLesson], truths: Sequence[bool | None] | None) -> Text:
    """Return one line with the number of active and retired lessons, and how many of them are true."""
    parts = []
    for state, retired in (("active", False), ("retired", True)):
        which = [number for number, lesson in enumerate(lessons) if lesson.retired is retired]
        known = [] if truths is None else [truths[number] for number in which if truths[number] is not None]
        parts.append(f"{len(which)} {state}" + (f" ({sum(map(bool, known))} of {len(known)} true)" if known else ""))
    return Text(f"{len(lessons)} {'lesson' if len(lessons) == 1 else 'lessons'}: {', '.join(parts)}", style="dim")


def comparison_table(before: EvalResult, after: EvalResult) -> Table:
    """Render two evaluations and their paired difference in percentage points, with 95 % intervals."""
    found, warning = evaluation(before, after)
    table = Table("held-out tasks", "before", "after", "change, paired", title="Evaluation", title_justify="left")
    table.caption = " ".join(filter(None, (f"95 % intervals; {after.conditions()}.", warning)))
    for measure in found:
        change = "" if measure.change is None else measure.change.as_points()
        table.add_row(measure.name, measure.before.as_share(), measure.after.as_share(), change)
    table.add_row("truncated at the token limit", f"{before.truncation_rate:.1%}", f"{after.truncation_rate:.1%}", "")
    return table


def funnel_table(totals: Mapping[str, int]) -> Table:
    """Render the funnel, summed over the run."""
    table = Table("stage", "count", "share of previous", title="Funnel of this run", title_justify="left")
    previous = 0
    for stage, name in FUNNEL.items():
        if stage == "written":
            continue
        count = totals.get(f"mel/{stage}", 0)
        table.add_row(name, str(count), f"{count / previous:.0%}" if previous else "")
        previous = count
    quoted, parsed = totals.get("mel/quoted", 0), totals.get("mel/parsed", 0)
    table.add_row("parsed ones that quote a step", str(quoted), f"{quoted / parsed:.0%} of parsed" if parsed else "")
    table.add_row("trained tokens", str(totals.get("mel/trained_tokens", 0)), "")
    return table


def peaks_table(peaks: Sequence[PhasePeak], budget_bytes: int | None) -> Table:
    """Render the predicted and the measured peak of every phase of the worst step."""
    budget = "" if budget_bytes is None else f" (budget {budget_bytes / GIB:.1f} GiB)"
    table = Table(title=f"worst step: peak memory{budget}", box=None)
    for column in ("phase", "predicted", "measured", "measured / predicted"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for peak in peaks:
        predicted, measured, ratio = "", "out of memory", ""
        if peak.predicted_bytes:
            predicted = f"{peak.predicted_bytes / GIB:.2f} GiB"
        if peak.measured_bytes is not None:
            measured = f"{peak.measured_bytes / GIB:.2f} GiB"
        if peak.predicted_bytes and peak.measured_bytes is not None:
            ratio = f"{peak.measured_bytes / peak.predicted_bytes:.2f}"
        table.add_row(peak.name, predicted, measured, ratio)
    return table


def plan_view(plan: Plan) -> RenderableType:
    """Render a memory plan: one bar per phase, the chosen settings and the notes."""
    kind, limit = ("memory", "budget") if plan.on_cpu else ("GPU memory", "card")
    title = f"[bold]predicted {kind}: {escape(plan.model)} on {plan.gpu}, {plan.engine.title}[/]"
    table = Table(show_header=False, box=None)
    scale = max(plan.budget_bytes, *(phase.bytes for phase in plan.phases))
    for phase in plan.phases:
        fits = phase.bytes <= plan.budget_bytes
        if phase.name == "export" and plan.engine.engine == "unsloth":
            fits = True  # this export takes host memory
        color = "green" if fits else ("yellow" if phase.name == "export" else "red")
        bar = "█" * max(1, round(40 * phase.bytes / scale))
        table.add_row(phase.name, f"[{color}]{bar}[/]", f"{phase.bytes / GIB:.1f} GiB")
    table.add_row(limit, "─" * round(40 * plan.budget_bytes / scale), f"{plan.budget_bytes / GIB:.1f} GiB")
    settings = "  ".join(f"{key.partition('.')[2] or key}={value}" for key, value in plan.choices.items())
    return Group(title, table, f"[dim]{settings}[/]", *(f"[yellow]note:[/] {note}" for note in plan.notes))
