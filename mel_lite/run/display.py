"""What a run looks like in a terminal: a line per step, a sample now and then, a summary at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from mel_lite.lessons.store import ExperienceRow
from mel_lite.memory.formulas import GIB
from mel_lite.models.chat import question_text
from mel_lite.resilience.worst_step import PhasePeak
from mel_lite.text import printable
from mel_lite.types import Status

FUNNEL = ("groups", "mixed_groups", "pairs", "parsed", "leak_free", "replay_valid")
STATUS_STYLE = {Status.KEPT: "green", Status.LEAKED: "red", Status.UNPARSED: "yellow", Status.REPLAY_FAILED: "yellow"}


def plain(text: str | None, limit: int | None = None) -> Text:
    """Model text for a terminal: no markup, no control characters (they could move the cursor), at most `limit`."""
    cleaned = printable(text or "")
    if limit is not None and len(cleaned) > limit:
        cleaned = cleaned[: limit - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    return Text(cleaned)


def one_line(text: str | None, limit: int) -> Text:
    """The same on a single line."""
    return plain(" ".join((text or "").split()), limit)


class LiveDisplay(TrainerCallback):
    """Prints one line per logged step above a progress bar with the time left, and a sample every few steps."""

    side_service = True
    """A terminal that is gone does not stop training."""

    def __init__(self, console: Console, trainer: Any = None, *, sample_every: int = 10) -> None:
        self._console = console
        self._sample_every = sample_every
        self._last_sample = 0
        self._progress: Progress | None = None
        self._task: Any = None
        self.trainer = trainer
        """Where samples come from; None = there are none to show."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._console.print(_legend(args))
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
            TimeRemainingColumn(), console=self._console, transient=True,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:
            return
        self._console.print(step_line(state.global_step, state.max_steps, logs))
        if self.trainer is None or (self._last_sample and state.global_step - self._last_sample < self._sample_every):
            return
        if (sample := self.trainer.latest_sample()) is not None:
            self._last_sample = state.global_step
            self._console.print(sample_panel(sample))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the progress bar away; also after an error, or the terminal keeps a stale line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _legend(args: Any) -> Text:
    if not args.with_meta_experience:
        return Text("step | reward | policy loss | gradient norm | tokens/s", style="dim")
    return Text(
        "step | reward pass rate | groups>mixed>pairs>parsed>leak-free>replay-valid (trained tokens) | "
        "ret = kept/written, up = replay uplift | policy loss, NLL of lessons (before>after the update) | "
        "gradient norms",
        style="dim",
    )


def step_line(step: int, max_steps: int, logs: dict[str, Any]) -> Text:
    """One step in one line; a figure the step does not have is left out."""

    def figure(name: str, label: str, spec: str) -> str:
        value = logs.get(name)
        return "" if value is None else f"{label}{value:{spec}}"

    parts = [f"{step:>{len(str(max_steps))}}/{max_steps}"]
    parts.append(f"{figure('reward', 'reward ', '.2f')} {figure('mel/pass_rate', 'pass ', '.0%')}".strip())
    if "mel/groups" in logs:
        stages = ">".join(f"{logs[f'mel/{stage}']:g}" for stage in FUNNEL)
        parts.append(f"{stages} ({logs['mel/trained_tokens']:g} tok)")
        parts.append(
            f"{figure('mel/retention_ratio', 'ret ', '.2f')} {figure('mel/replay_uplift', 'up ', '+.2f')}".strip()
        )
    after = figure("mel/nll_after", ">", ".3f")
    parts.append(
        f"policy {logs.get('mel/policy_loss', logs.get('loss', 0.0)):+.4f}{figure('mel/nll', ' nll ', '.3f')}{after}"
    )
    norms = f"{figure('mel/grad_norm_policy', 'policy ', '.3f')}{figure('mel/grad_norm_nll', ' nll ', '.3f')}"
    parts.append(f"|g| {norms}" if norms else figure("grad_norm", "|g| ", ".3f"))
    parts.append(figure("mel/tokens_per_s", "", ".0f") + " tok/s" if "mel/tokens_per_s" in logs else "")
    return Text(" | ".join(part for part in parts if part))


def sample_panel(row: ExperienceRow) -> RenderableType:
    """One meta-experience with the rollouts it came from."""
    parts: list[RenderableType] = [
        _labelled("question", one_line(question_text(row.prompt), 300)),
        _labelled("wrong", one_line(row.wrong_text, 300), "red"),
        _labelled("right", one_line(row.right_text, 300), "green"),
    ]
    if row.heuristic is None:
        parts.append(_labelled("analysis", one_line(row.analysis, 400)))
    else:
        for name in ("bifurcation", "critique", "heuristic"):
            parts.append(_labelled(name, one_line(getattr(row, name), 400), "cyan"))
    if row.replay_verdicts:
        replayed = ", ".join(row.replay_verdicts)
        control = f" (without it: {', '.join(row.control_verdicts)})" if row.control_verdicts else ""
        parts.append(_labelled("replay", Text(replayed + control)))
    if row.nll_before is not None and row.nll_after is not None:
        parts.append(_labelled("NLL", Text(f"{row.nll_before:.3f} > {row.nll_after:.3f} nats/token by its update")))
    if row.reason:
        parts.append(_labelled("dropped", one_line(row.reason, 300), "yellow"))
    title = f"meta-experience {row.id}, step {row.step}: {row.status}"
    return Panel(Group(*parts), title=title, title_align="left", border_style=STATUS_STYLE[row.status])


def _labelled(label: str, text: Text, style: str = "bold") -> Text:
    return Text.assemble((f"{label}: ", style), text)


def experiences_table(rows: Sequence[ExperienceRow]) -> Table:
    """Rows of the store."""
    table = Table("id", "step", "status", "question", "heuristic, or why it was dropped", show_lines=False)
    for row in rows:
        status = Text(row.status, style=STATUS_STYLE[row.status])
        lesson = row.heuristic if row.status is Status.KEPT else row.reason
        table.add_row(
            str(row.id), str(row.step), status, one_line(question_text(row.prompt), 60), one_line(lesson, 110)
        )
    return table


def comparison_table(before: Any, after: Any) -> Table:
    """Two evaluations on the same tasks, with 95 % intervals."""
    table = Table("held-out tasks", "before", "after", title="Evaluation", title_justify="left")
    table.caption = after.conditions()
    rows = {"Pass@1 (greedy)": "pass_at_1", f"Avg@{after.k}": "avg_at_k", f"Pass@{after.k}": "pass_at_k"}
    for label, name in rows.items():
        table.add_row(label, str(getattr(before, name)), str(getattr(after, name)))
    table.add_row("cut off at the token limit", f"{before.truncation_rate:.1%}", f"{after.truncation_rate:.1%}")
    return table


def store_line(counts: Mapping[Status, int]) -> Text:
    """How many meta-experiences ended in which way."""
    total = sum(counts.values())
    parts = [f"{counts.get(status, 0)} {status.replace('_', ' ')}" for status in Status]
    return Text(f"{total} meta-experiences: {', '.join(parts)}", style="dim")


def experience_page(row: ExperienceRow) -> RenderableType:
    """One meta-experience whole."""
    sections = [
        ("question", question_text(row.prompt)),
        ("reference answer", row.answer),
        (f"wrong (rollout {row.wrong_index})", row.wrong_text),
        (f"right (rollout {row.right_index}), {row.common_prefix_tokens} tokens in common", row.right_text),
        (f"analysis as sampled ({row.analysis_tokens} tokens)", row.analysis),
        ("bifurcation", row.bifurcation),
        ("critique", row.critique),
        ("heuristic", row.heuristic),
        ("leaks", "\n".join(row.leak_reasons)),
        *((f"replay: {v}", t) for v, t in zip(row.replay_verdicts, row.replay_texts, strict=False)),
        ("replay without it", ", ".join(row.control_verdicts)),
        ("why it was dropped", row.reason),
    ]
    figures = [f"{name} {value:.3f}" for name, value in _nlls(row) if value is not None]
    if figures:
        sections.append(("NLL in nats per token", ", ".join(figures)))
    title = f"meta-experience {row.id}, step {row.step}: {row.status}"
    parts = [Text.assemble((f"{label}\n", "bold cyan"), plain(text), "\n") for label, text in sections if text]
    return Panel(Group(*parts), title=title, title_align="left", border_style=STATUS_STYLE[row.status])


def _nlls(row: ExperienceRow) -> tuple[tuple[str, float | None], ...]:
    return (("when written", row.nll_written), ("before its update", row.nll_before), ("after", row.nll_after))


def funnel_table(totals: Mapping[str, int]) -> Table:
    """The funnel summed over the run."""
    table = Table("stage", "count", "left of the one before", title="Funnel of this run", title_justify="left")
    previous = 0
    for stage in FUNNEL:
        count = totals.get(f"mel/{stage}", 0)
        table.add_row(stage.replace("_", " "), str(count), f"{count / previous:.0%}" if previous else "")
        previous = count
    table.add_row("trained tokens", str(totals.get("mel/trained_tokens", 0)), "")
    return table


def peaks_table(peaks: Sequence[PhasePeak], budget_bytes: int | None) -> Table:
    """Predicted and measured peak of every phase of the worst step."""
    budget = "" if budget_bytes is None else f" ({budget_bytes / GIB:.1f} GiB there are)"
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
