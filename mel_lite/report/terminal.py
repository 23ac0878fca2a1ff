"""Meta-experiences and rollouts in a terminal. Model text never controls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mel_lite.lessons.store import ExperienceRow
from mel_lite.models.chat import question_text
from mel_lite.report.credit import CreditStrip
from mel_lite.report.rollouts import RolloutRow
from mel_lite.text import printable
from mel_lite.types import Status

NARROW = 70
"""Columns below which rows are listed in blocks, not as a table."""
STATUS_STYLE = {Status.KEPT: "green", Status.LEAKED: "red"} | dict.fromkeys(
    (Status.UNPARSED, Status.NOT_LIFTING, Status.REPLAY_FAILED), "yellow"
)
CREDIT_STYLE = {
    -4: "bold underline black on dark_orange", -3: "underline black on dark_orange", -2: "bold underline dark_orange",
    -1: "underline dark_orange", 0: "", 1: "dodger_blue1", 2: "bold dodger_blue1", 3: "black on dodger_blue1",
    4: "bold black on dodger_blue1",
}  # fmt: skip
"""Style of a token by the level of its credit."""
Section = tuple[str, "str | Text | None"]
VERDICT_STYLE = {"right": "green", "wrong": "red", "abstain": "yellow"}


def plain(text: str | None, limit: int | None = None) -> Text:
    """Return model text that is safe for a terminal: no markup, no control characters, at most `limit` characters."""
    cleaned = printable(text or "")
    if limit is not None and len(cleaned) > limit:
        cleaned = cleaned[: limit - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    return Text(cleaned)


def one_line(text: str | None, limit: int) -> Text:
    """Return `plain` text on a single line."""
    return plain(" ".join((text or "").split()), limit)


def labeled(label: str, text: Text, style: str = "bold") -> Text:
    """Return a text after its label."""
    return Text.assemble((f"{label}: ", style), text)


def experiences_list(rows: Sequence[ExperienceRow], width: int) -> RenderableType:
    """Render rows of the store: one per line, or in blocks on a terminal narrower than `NARROW` columns."""
    cells = [
        (
            str(row.id),
            str(row.step),
            Text(row.status, style=STATUS_STYLE[row.status]),
            question_text(row.prompt),
            row.heuristic if row.status is Status.KEPT else row.reason,
        )
        for row in rows
    ]
    if width < NARROW:
        return Group(
            *(
                Text.assemble(f"{id_}, step {step}, ", status, "\n  ", one_line(asked, 120), "\n  ", one_line(say, 200))
                for id_, step, status, asked, say in cells
            )
        )
    table = Table("id", "step", "status", "question", "heuristic, or reason for the drop", show_lines=False)
    for id_, step, status, asked, say in cells:
        table.add_row(id_, step, status, one_line(asked, 60), one_line(say, 110))
    return table


def store_line(counts: Mapping[Status, int]) -> Text:
    """Return one line with the number of meta-experiences per status."""
    total = sum(counts.values())
    parts = [f"{counts.get(status, 0)} {status.replace('_', ' ')}" for status in Status]
    return Text(f"{total} meta-experiences: {', '.join(parts)}", style="dim")


def experience_page(row: ExperienceRow, credit: Sequence[CreditStrip] = ()) -> RenderableType:
    """Render one meta-experience in full. The analysis appears once: by its parts, or as sampled if it has none."""
    parts = [(name, getattr(row, name)) for name in ("bifurcation", "critique", "heuristic")]
    parsed = any(text for _, text in parts)
    sections: list[Section] = [
        ("question", question_text(row.prompt)),
        ("reference answer", row.answer),
        (f"wrong (rollout {row.wrong_index})", row.wrong_text),
        (f"right (rollout {row.right_index}), {row.common_prefix_tokens} tokens in common", row.right_text),
        (f"analysis as sampled ({row.analysis_tokens} tokens)", None if parsed else row.analysis),
        *parts,
        ("wrong step it quotes", row.quoted_step),
        ("leaks", "\n".join(row.leak_reasons)),
        *((f"replay: {v}", t) for v, t in zip(row.replay_verdicts, row.replay_texts, strict=False)),
        ("replay without it", ", ".join(row.control_verdicts)),
        ("lift of the right rollouts over the wrong ones", _nats(row.shift_nats)),
        ("staleness", _staleness(row)),
        ("reason for the drop", row.reason),
        ("NLL in nats per token", _nlls(row)),
        *_credit_sections(credit),
    ]
    return _page(f"meta-experience {row.id}, step {row.step}: {row.status}", sections, STATUS_STYLE[row.status])


def _staleness(row: ExperienceRow) -> str:
    if not row.staleness_steps:
        return ""
    return (
        f"rollouts of step {row.rollouts_step}; complete {row.staleness_steps} steps and {row.staleness_versions} "
        "updates of the weights later"
    )


def _page(title: str, sections: Sequence[Section], style: str) -> Panel:
    shown = [(label, text if isinstance(text, Text) else plain(text)) for label, text in sections if text]
    parts = [Text.assemble((f"{label}\n", "bold cyan"), text, "\n") for label, text in shown]
    return Panel(Group(*parts), title=title, title_align="left", border_style=style)


def _credit_sections(credit: Sequence[CreditStrip]) -> list[Section]:
    """Return each strip, and the numbers of its most changed tokens."""
    sections: list[Section] = []
    for strip in credit:
        cut = f", {strip.cut}" if strip.cut else ""
        sections.append((f"token credit of the {strip.verdict} solution, read by {strip.way}{cut}", credit_text(strip)))
        largest = "\n".join(f"{token.text.strip() or '(blank)'}: {token.title}" for token in strip.strongest[:8])
        sections.append(("its most changed tokens: log-prob with the notes minus without, and effect", largest))
    return sections


def credit_text(strip: CreditStrip) -> Text:
    """Return the tokens of a strip: blue where notes make them likelier, orange and underlined where less likely."""
    text = Text()
    for token in strip.tokens:
        text.append(token.text.expandtabs(4), CREDIT_STYLE[token.level])
    return text


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f} nats"


def _nlls(row: ExperienceRow) -> str:
    values = {"when written": row.nll_written, "before its update": row.nll_before, "after": row.nll_after}
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)


def rollouts_list(rows: Sequence[RolloutRow], width: int) -> RenderableType:
    """Render rollouts: one per line, or in blocks on a terminal narrower than `NARROW` columns."""
    cells = [(row.id, _verdict(row), _number(row.reward), row.question, row.text) for row in rows]
    if width < NARROW:
        return Group(
            *(
                Text.assemble(
                    f"{id_}, ", verdict, f", reward {reward}\n  ", one_line(asked, 120), "\n  ", one_line(text, 200)
                )
                for id_, verdict, reward, asked, text in cells
            )
        )
    table = Table("id", "verdict", "reward", "question", "text", show_lines=False)
    for id_, verdict, reward, asked, text in cells:
        table.add_row(id_, verdict, reward, one_line(asked, 60), one_line(text, 110))
    return table


def rollout_page(row: RolloutRow, credit: Sequence[CreditStrip] = ()) -> RenderableType:
    """Render one rollout in full."""
    known = {"verdict": row.verdict, "reward": _number(row.reward), "advantage": _number(row.advantage)}
    figures = [f"{name} {value}" for name, value in known.items() if value not in (None, "-")]
    sections: list[Section] = [
        ("question", row.question),
        ("rollout", row.text or "(empty)"),
        ("figures", ", ".join(figures)),
        ("other columns", "\n".join(f"{name}: {value}" for name, value in row.columns.items())),
        *_credit_sections(credit),
    ]
    return _page(
        f"rollout {row.id}: row {row.row} of step {row.step}", sections, VERDICT_STYLE.get(str(row.verdict), "")
    )


def _verdict(row: RolloutRow) -> Text:
    return Text(row.verdict or "-", style=VERDICT_STYLE.get(str(row.verdict), "dim"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
