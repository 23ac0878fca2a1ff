"""Figures of a probe: data types, JSON and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mel_lite.intervals import Estimate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class Attempts:
    """Rollouts of all probed prompts. Shares are of the prompts; they and `unjudged_share` add up to 1."""

    pass_rate: float | None
    """Share of judged completions that are right; None when the verifier abstained on all."""
    mixed_share: float
    """Prompts with right and wrong completions."""
    wrong_share: float
    """Prompts without a right completion."""
    right_share: float
    """Prompts without a wrong completion."""

    @property
    def unjudged_share(self) -> float:
        """Prompts on whose completions the verifier abstained."""
        return 1 - self.mixed_share - self.wrong_share - self.right_share


@dataclass(frozen=True, slots=True)
class Lessons:
    """Meta-experiences of the lesson prompts: counts, and means with 95 % bootstrap intervals over lessons."""

    pairs: int
    """Pairs of a right and a wrong completion of a group."""
    written: int
    """Analyses: one for each pair that fits `max_context_tokens`."""
    cut_off: int
    """Analyses that did not end within `analysis_max_tokens`."""
    parsed: int
    quoted: int
    """Parsed ones whose bifurcation quotes the wrong solution."""
    leaked: int
    kept: int
    """Those that the run's own `replay_criterion` keeps."""
    replayed: int
    solved: float | None
    """Share of attempts with the lesson that were right."""
    resampled: float | None
    """Share of attempts without it on the same seeds that were right."""
    uplift: Estimate | None
    """`solved - resampled`."""
    shift_nats: Estimate | None
    """Lift by a lesson of the right rollouts of its group minus that of the wrong ones."""
    shift_from_fork: float | None
    """Share of sum_t |log pi(y_t | M, x) - log pi(y_t | x)| at and after the fork, over wrong rollouts."""
    tokens_from_fork: float | None
    """Share of these rollouts' tokens at and after the fork: what an even shift would give."""
    token_share: float
    """Share of a training step's generated tokens that lessons take, with the run's own replay options."""


@dataclass(frozen=True, slots=True)
class WayGradient:
    """Gradient of one way to train on lessons, at lambda 1, over the batches that the lessons come from."""

    name: str
    internalisation: str | Mapping[str, float] | None
    """Value of the option; None for the policy loss itself."""
    options: Mapping[str, Any] = field(default_factory=dict)
    cosine: Estimate | None = None
    """Cosine of its sum over batches with the reference gradient; None when it had no gradient."""
    norm: float = 0.0
    """Mean over batches of the L2 norm."""
    ratio: float | None = None
    """`norm` over that of the policy loss on the same batches; None when that is 0."""
    prompts: int = 0
    """Prompts that gave it a gradient."""
    teacher_shift_nats: float | None = None
    """Mean over batches of how much more its teacher lifts right rollouts than wrong ones; None without a teacher."""

    @property
    def needs_lessons(self) -> bool:
        """False when it learns from rollouts alone."""
        return self.internalisation is not None and self.options.get("context") != "sibling"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """All figures of a probe, its advice, and what is needed to repeat it."""

    model: str
    dataset: str
    seed: int
    prompts: int
    """Different prompts: a third of the batches gives lessons, the others the reference gradient."""
    lesson_prompts: int
    group_size: int
    """Completions per prompt."""
    replay_attempts: int
    """Attempts per lesson, with it and without."""
    mel_weight: float
    """The run's lambda."""
    attempts: Attempts
    lessons: Lessons
    halves: Estimate | None
    """Cosine of the reference gradient's two halves: the noise floor. None when a half is 0."""
    ways: tuple[WayGradient, ...]
    """The policy loss first."""
    choice: str | None = None
    """Name of the way to choose; None = train without lessons."""
    options: str = ""
    """Options of `mel-lite train` for that choice; empty where nothing can be learned."""
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Options of the run that the probe did not follow."""

    @property
    def highest_cosine(self) -> float | None:
        """Cosine that the true policy gradient would have with the reference: sqrt(2 h / (1 + h)), h = `halves`."""
        if self.halves is None or self.halves.value <= 0:
            return None
        return math.sqrt(2 * self.halves.value / (1 + self.halves.value))

    def to_json(self) -> str:
        """Return all fields as a JSON object."""
        return json.dumps(asdict(self), indent=1)

    def show(self, console: Console) -> None:
        """Print the figures and the advice."""
        console.print(_rates(self))
        console.print(_gradients(self))
        console.print(_listed(self.advice))
        if self.options:
            console.print(f"  {self.options}", markup=False, highlight=False, soft_wrap=True)


def read_result(text: str) -> ProbeResult:
    """Return the result whose `to_json` this is."""
    raw = json.loads(text)

    def estimated(fields: dict[str, Any], *names: str) -> dict[str, Any]:
        return fields | {name: Estimate(**fields[name]) for name in names if fields[name] is not None}

    return ProbeResult(
        **estimated(raw, "halves")
        | {
            "attempts": Attempts(**raw["attempts"]),
            "lessons": Lessons(**estimated(raw["lessons"], "uplift", "shift_nats")),
            "ways": tuple(WayGradient(**estimated(way, "cosine")) for way in raw["ways"]),
            "advice": tuple(raw["advice"]),
            "notes": tuple(raw["notes"]),
        }
    )


def _rates(result: ProbeResult) -> Table:
    from rich.table import Table

    shown, lessons = result.attempts, result.lessons
    table = Table("measure", "value", title="Rollouts and lessons", title_justify="left", caption_justify="left")
    table.caption = (
        f"{result.prompts} prompts x {result.group_size} completions, seed {result.seed}; lessons from "
        f"{result.lesson_prompts} of the prompts"
    )
    table.add_row("completions that are right", percent(shown.pass_rate))
    table.add_row("groups: mixed / all wrong / all right", " / ".join(
        percent(share) for share in (shown.mixed_share, shown.wrong_share, shown.right_share)
    ))  # fmt: skip
    if shown.unjudged_share > 1e-9:
        table.add_row("groups that were not judged", percent(shown.unjudged_share))
    unfit = f" ({lessons.pairs} pairs, {lessons.pairs - lessons.written} too long)"
    table.add_row("analyses written", f"{lessons.written}{unfit if lessons.pairs > lessons.written else ''}")
    if lessons.written:
        for cells in _lesson_rows(result):
            table.add_row(*cells)
    return table


def _lesson_rows(result: ProbeResult) -> Iterator[tuple[str, str]]:
    lessons = result.lessons
    for label, count, total, whole in (
        ("cut off", lessons.cut_off, lessons.written, "of the written"),
        ("parsed", lessons.parsed, lessons.written, "of the written"),
        ("quote a wrong step", lessons.quoted, lessons.parsed, "of the parsed"),
        ("name the answer (leaked)", lessons.leaked, lessons.parsed, "of the parsed"),
        ("kept", lessons.kept, lessons.written, "of the written"),
    ):
        yield f"  {label}", f"{count} ({percent(count / total)} {whole})" if total else str(count)
    yield "lessons' share of generated tokens", percent(lessons.token_share)
    if not lessons.replayed:
        return
    yield (
        "lessons replayed",
        f"{lessons.replayed}, {result.replay_attempts} times with and {result.replay_attempts} without",
    )
    yield "  solved with / without", f"{percent(lessons.solved)} / {percent(lessons.resampled)}"
    yield "  uplift over plain resampling", points(lessons.uplift)
    yield "  scored shift, nats", signed(lessons.shift_nats)
    even = "" if lessons.tokens_from_fork is None else f" ({percent(lessons.tokens_from_fork)} of the tokens)"
    yield "  share of the shift from the fork on", percent(lessons.shift_from_fork) + even


def _gradients(result: ProbeResult) -> Table:
    from rich.table import Table

    title = "Gradients, and their cosine with a reference: the policy's on other prompts"
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("loss", no_wrap=True)
    table.add_column("cosine", no_wrap=True)
    for header in ("norm /\npolicy's", "teacher\nshift", "prompts"):
        table.add_column(header, justify="right", no_wrap=True)
    table.caption = f"two halves of the reference with each other: {signed(result.halves)}"
    if result.highest_cosine is not None:
        table.caption += f"\nthe true policy gradient with the reference: {result.highest_cosine:+.2f}"
    for way in result.ways:
        ratio = "-" if way.ratio is None or way.cosine is None else f"{way.ratio:.2g}"
        shift = "-" if way.teacher_shift_nats is None else f"{way.teacher_shift_nats:+.2f}"
        table.add_row(way.name, signed(way.cosine), ratio, shift, str(way.prompts))
    return table


def _listed(lines: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    listed = Table.grid(padding=(0, 1))
    for line in lines:
        listed.add_row("-", Text(line))
    return listed


def percent(share: float | None) -> str:
    """Return a share in percent, with a decimal within 10 points of 0 and 100; `-` for None."""
    if share is None:
        return "-"
    return f"{share:.1%}" if 0 < share < 0.1 or 0.9 < share < 1 else f"{share:.0%}"


def points(estimate: Estimate | None) -> str:
    """Return a difference of shares in points with its interval; `-` for None."""
    return "-" if estimate is None else f"{estimate.as_points()} points"


def signed(estimate: Estimate | None) -> str:
    """Return a mean with its interval; `-` for None."""
    return "-" if estimate is None else f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"
