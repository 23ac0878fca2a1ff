"""Browse a run's meta-experiences in the terminal with Textual, also while the run writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Container, VerticalScroll
from textual.events import Resize
from textual.widgets import DataTable, Input, Static

from mel_lite.errors import ConfigError, StoreError
from mel_lite.lessons.store import FILE_NAME, ExperienceStore, Outline
from mel_lite.models.chat import question_text
from mel_lite.report.credit import CreditStrip, strips_of
from mel_lite.report.lessons import LessonView, Segment, status_text, view
from mel_lite.report.terminal import STATUS_STYLE, VERDICT_STYLE, credit_text, one_line
from mel_lite.text import first_line, printable
from mel_lite.types import Status

REFRESH_S = 2.0
MOST_ROWS = 1000
"""Newest matching rows in the list."""
SIDE_BY_SIDE = 100
"""Columns from which both solutions stand next to each other."""
MARKS = {"same": "dim", "fork": "bold reverse", "quoted": "underline", "fork quoted": "bold reverse underline"}
KEYS = (
    "\u2191\u2193 row",
    "space/b scroll",
    "v verdict",
    "s step",
    "/ task",
    "esc all",
    "g newest",
    "z zoom",
    "c credit",
    "q quit",
)
HELP = " \u00b7 ".join(KEYS)


class Browser(App[None]):
    """List of meta-experiences, newest first, over one of them in full."""

    TITLE = "mel-lite experiences browse"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #state { height: auto; background: $boost; padding: 0 1; }
    #rows { height: 2fr; min-height: 4; scrollbar-size: 1 0; }
    #detail { height: 5fr; scrollbar-size: 1 1; border-top: solid $primary; padding: 0 1; }
    #pair { height: auto; layout: vertical; }
    #pair Static { width: 1fr; height: auto; border: round $success; padding: 0 1; }
    #pair #wrong { border: round $error; }
    .wide #pair { layout: horizontal; }
    #detail > Static { height: auto; }
    #entry { display: none; }
    .entering #entry { display: block; }
    .zoomed #rows { display: none; }
    #help { height: auto; color: $text-muted; padding: 0 1; }
    """
    BINDINGS: ClassVar = [
        Binding("j,down", "move(1)", priority=True),
        Binding("k,up", "move(-1)", priority=True),
        Binding("space,pagedown", "scroll(1)", priority=True),
        Binding("b,pageup", "scroll(-1)", priority=True),
        Binding("g", "newest"),
        Binding("v", "next_verdict"),
        Binding("s", "enter('step')"),
        Binding("slash", "enter('task')"),
        Binding("z", "zoom"),
        Binding("c", "credit"),
        Binding("escape", "clear"),
        Binding("q", "quit"),
    ]

    def __init__(self, run: Path) -> None:
        """Raises: ConfigError when the folder holds no run."""
        super().__init__()
        if not any((run / name).is_file() for name in (FILE_NAME, "config.yaml", "metrics.jsonl")):
            raise ConfigError(f"{run} holds no run: it has neither {FILE_NAME} nor config.yaml nor metrics.jsonl.")
        self._run = run
        self._store: ExperienceStore | None = None
        self._known: list[Outline] = []
        self._shown: list[Outline] = []
        self._wanted_verdict: Status | None = None
        self._wanted_step: int | None = None
        self._wanted_task = ""
        self._entering = ""
        self._trouble = ""
        self._credit = False

    def compose(self) -> ComposeResult:
        yield Static(id="state")
        yield DataTable(id="rows", cursor_type="row", zebra_stripes=True)
        with VerticalScroll(id="detail", can_focus=False):
            yield Static(id="head")
            with Container(id="pair"):
                yield Static(id="wrong")
                yield Static(id="right")
            yield Static(id="lesson")
        yield Input(id="entry")
        yield Static(HELP, id="help", markup=False)

    def on_mount(self) -> None:
        self._rows.add_columns("id", "step", "verdict", "question", "lesson, or reason for the drop")
        self._rows.focus()
        self._fill()
        self.read_new()
        self.set_interval(REFRESH_S, self.read_new)

    def on_resize(self, event: Resize) -> None:
        self.screen.set_class(event.size.width >= SIDE_BY_SIDE, "wide")

    def on_unmount(self) -> None:
        if self._store is not None:
            self._store.close()

    @property
    def _rows(self) -> DataTable[Text]:
        return self.query_one("#rows", DataTable)

    # ---- reading ----

    def read_new(self) -> None:
        """Read what was written since the last time; a run that resumed may have taken rows back."""
        last = self._known[-1].id if self._known else 0
        before = self._trouble, last
        try:
            if self._store is None and (self._run / FILE_NAME).is_file():
                self._store = ExperienceStore(self._run / FILE_NAME, read_only=True)
            if self._store is not None:
                if self._store.last_id() < last:
                    self._known, last = [], 0
                self._known += self._store.outline(after=last)
            self._trouble = ""
        except StoreError as error:
            self._trouble = printable(first_line(error, 300))
        if before != (self._trouble, self._known[-1].id if self._known else 0):
            self._fill()
        self._draw_state()

    def _matches(self, row: Outline) -> bool:
        words = self._wanted_task.casefold().split()
        return (
            self._wanted_verdict in (None, row.status)
            and self._wanted_step in (None, row.step)
            and (not words or all(word in question_text(row.prompt).casefold() for word in words))
        )

    def _fill(self) -> None:
        """List the rows that match, and keep the cursor on its row, or on the newest one."""
        chosen = self._selected
        matching = [row for row in reversed(self._known) if self._matches(row)]
        self._shown = matching[:MOST_ROWS]
        self._rows.clear()
        for row in self._shown:
            verdict = Text(status_text(row.status), style=STATUS_STYLE[row.status])
            asked, lesson = one_line(question_text(row.prompt), 60), one_line(row.lesson, 200)
            self._rows.add_row(Text(str(row.id)), Text(str(row.step)), verdict, asked, lesson)
        place = next((i for i, row in enumerate(self._shown) if chosen and row.id == chosen.id), 0)
        self._rows.move_cursor(row=place)
        self._draw_detail()

    @property
    def _selected(self) -> Outline | None:
        at = self._rows.cursor_row
        return self._shown[at] if 0 <= at < len(self._shown) else None

    # ---- drawing ----

    def _draw_state(self) -> None:
        task = f"task: {self._wanted_task or 'all'}"
        filters = f"verdict: {self._wanted_verdict or 'all'} \u00b7 step: {self._wanted_step or 'all'} \u00b7 {task}"
        matching = sum(map(self._matches, self._known))
        count = f"{matching:,} of {len(self._known):,}" + (f", newest {MOST_ROWS:,}" if matching > MOST_ROWS else "")
        parts: list[Text | tuple[str, str]] = [
            (printable(self._run.resolve().name), "bold"),
            Text(f" \u00b7 {count} \u00b7 {printable(filters).replace('_', ' ')}"),
        ]
        if self._trouble:
            parts.append((f"\n{self._trouble}", "yellow"))
        self.query_one("#state", Static).update(Text.assemble(*parts))

    def _draw_detail(self) -> None:
        """Show the selected row in full."""
        head, wrong, right, lesson = (
            self.query_one(f"#{name}", Static) for name in ("head", "wrong", "right", "lesson")
        )
        row = self._selected
        self.query_one("#pair").display = row is not None
        lesson.update("")
        if row is None or self._store is None:
            head.update(Text(self._nothing()))
            return
        try:
            full = self._store.get(row.id)
            credit = strips_of(full, self._store) if self._credit else ()
        except StoreError as error:
            head.update(Text(printable(first_line(error, 300)), style="yellow"))
            return
        seen = view(full, credit)
        head.update(_head(seen, full.status))
        wrong.border_title = f"wrong (rollout {full.wrong_index})"
        right.border_title = f"right (rollout {full.right_index})"
        for name, pane, segments in (("wrong", wrong, seen.wrong), ("right", right, seen.right)):
            strips = [strip for strip in credit if strip.verdict == name]
            pane.update(_credited(strips) if self._credit else _marked(segments))
        lesson.update(_lesson(seen))

    def _nothing(self) -> str:
        if self._known:
            return "No meta-experience matches. Press escape to see all."
        return "No meta-experience yet. They appear here as the run writes them; plain GRPO writes none."

    def place_of(self, id_: int) -> int:
        """Return the place in the list of a meta-experience that is listed."""
        return [row.id for row in self._shown].index(id_)

    # ---- keys ----

    def on_data_table_row_highlighted(self) -> None:
        self._draw_detail()
        self.query_one("#detail").scroll_home(animate=False)

    def action_move(self, rows: int) -> None:
        if self._entering:
            return
        self._rows.move_cursor(row=self._rows.cursor_row + rows)

    def action_scroll(self, pages: int) -> None:
        detail = self.query_one("#detail")
        detail.scroll_relative(y=pages * max(1, detail.size.height - 2), animate=False)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave the keys of rows and pages to the entry line while it is open."""
        return not (self._entering and action in ("move", "scroll"))

    def action_newest(self) -> None:
        self._rows.move_cursor(row=0)

    def action_next_verdict(self) -> None:
        order: Sequence[Status | None] = (None, Status.KEPT, *(each for each in Status if each is not Status.KEPT))
        self._wanted_verdict = order[(order.index(self._wanted_verdict) + 1) % len(order)]
        self._filter()

    def action_zoom(self) -> None:
        self.screen.toggle_class("zoomed")

    def action_credit(self) -> None:
        """Show the token credit in place of the marks, or the marks again."""
        self._credit = not self._credit
        self._draw_detail()

    def action_enter(self, what: str) -> None:
        entry = self.query_one("#entry", Input)
        self._entering = what
        entry.placeholder = "step, empty for all" if what == "step" else "words of the question, empty for all"
        entry.type = "integer" if what == "step" else "text"
        entry.value = str(self._wanted_step or "") if what == "step" else self._wanted_task
        self.screen.add_class("entering")
        entry.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if self._entering == "step":
            self._wanted_step = int(event.value) if event.value.lstrip("+-").isdecimal() else None
        else:
            self._wanted_task = event.value.strip()
        self._leave_entry()
        self._filter()

    def action_clear(self) -> None:
        """Close the entry line; without one, show all rows."""
        if self._entering:
            self._leave_entry()
            return
        self._wanted_verdict, self._wanted_step, self._wanted_task = None, None, ""
        self._filter()

    def _leave_entry(self) -> None:
        self._entering = ""
        self.screen.remove_class("entering")
        self._rows.focus()

    def _filter(self) -> None:
        self._fill()
        self._draw_state()


def _head(seen: LessonView, status: Status) -> Text:
    text = Text.assemble(
        (f"#{seen.id}, step {seen.step}: ", "bold"), (seen.status_text, STATUS_STYLE[status]), f"\n{seen.question}"
    )
    if seen.answer is not None:
        text.append(f"\nreference answer: {seen.answer}", "dim")
    if seen.reason:
        text.append(f"\ndropped: {seen.reason}", "yellow")
    return text


def _marked(segments: Sequence[Segment]) -> Text:
    """Return a solution with a line where the two part, the fork in reverse, and the quoted step underlined."""
    text, parted = Text(), False
    for segment in segments:
        if "fork" in segment.classes and not parted:
            parted = True
            text.append("\u2500\u2500 here they part \u2500\u2500\n", "bold")
        text.append(segment.text.expandtabs(4), MARKS.get(segment.classes, ""))
    return text


def _credited(strips: Sequence[CreditStrip]) -> Text:
    """Return the strips of one solution with the way that read it."""
    if not strips:
        return Text("No token credit is stored: nothing read this rollout with notes in the prompt.", "dim")
    text = Text()
    for strip in strips:
        text.append(f"{strip.way}: blue is likelier with the notes, orange less likely\n", "dim")
        text.append_text(credit_text(strip)).append(f"\n[{strip.cut}]\n" if strip.cut else "\n", "dim")
    return text


def _lesson(seen: LessonView) -> Text:
    text = Text(seen.quote)
    for name, part in seen.parts:
        text.append(f"\n\n{name}", "bold").append(f"\n{part}")
    if seen.replay_line:
        text.append("\n\nReplay", "bold").append(f"\n{seen.replay_line}: ")
        for verdict, _ in seen.replays:
            text.append(f"{verdict} ", VERDICT_STYLE[verdict])
    nats = {"when written": seen.nll_written, "before its update": seen.nll_before, "after": seen.nll_after}
    known = [f"{name} {value:.3f}" for name, value in nats.items() if value is not None]
    if known:
        text.append("\n\nNLL in nats per token", "bold").append(f"\n{', '.join(known)}")
    return text


def browse(run: Path) -> None:
    """Open the browser until the user quits. Raises: ConfigError when the folder holds no run; StoreError when its
    store cannot be read."""
    if (run / FILE_NAME).is_file():
        ExperienceStore(run / FILE_NAME, read_only=True).close()
    Browser(run).run()
