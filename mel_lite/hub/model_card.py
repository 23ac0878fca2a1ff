"""Model cards: of a run's folder, its adapter, and what is exported from it.

A card names a base by its Hub id or by its last name, never by a path of this machine. Texts that a model wrote are
fenced, so that they cannot act as Markdown or HTML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from mel_lite.errors import ConfigError
from mel_lite.files import atomic_write_text
from mel_lite.hub import metadata
from mel_lite.models.origin import DEMO
from mel_lite.report import figures
from mel_lite.report.record import stage_seconds
from mel_lite.report.runs import Run, phase_seconds, read_run
from mel_lite.text import printable
from mel_lite.types import Status

TEMPLATES = Path(__file__).parent / "templates"
MOST_HEURISTICS = 3
MOST_CHARACTERS = 800
"""Longer heuristics are cut in a card."""


class Kind(StrEnum):
    """Kind of folder that a card describes."""

    RUN = "run"
    """A run's folder."""
    ADAPTER = "adapter"
    """A LoRA adapter."""
    MODEL = "model"
    """A whole model: merged, or trained without LoRA."""
    GGUF = "gguf"
    """A merged model converted to GGUF."""


_LIBRARY = {Kind.RUN: "peft", Kind.ADAPTER: "peft", Kind.MODEL: "transformers", Kind.GGUF: None}
_RELATION = {Kind.RUN: "adapter", Kind.ADAPTER: "adapter", Kind.MODEL: "finetune", Kind.GGUF: "quantized"}
_WHAT = {
    Kind.RUN: "The folder of a training run on {base}: the LoRA adapter in `adapter/`, metrics, evaluations and "
    "meta-experiences.",
    Kind.ADAPTER: "A LoRA adapter for {base}. `mel_lite.json` identifies the exact base and how it was loaded.",
    Kind.MODEL: "A model trained from {base}.",
    Kind.GGUF: "A model trained from {base}, as a GGUF file.",
}
_ALGORITHMS = {
    "mel": "MEL (GRPO plus lessons that the model draws from its own mistakes)",
    "grpo": "GRPO",
    "reinforce++": "REINFORCE++",
    "rft": "rejection-sampling fine-tuning (RFT)",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """Subject of a card, apart from the run."""

    kind: Kind
    name: str
    base: str
    """Name of the base model as the run was given it."""
    export: str = ""
    """Sentences on how it was exported, and how far it differs from the adapter model."""
    tags: tuple[str, ...] = ()


def model_card(subject: Subject, run: Run | None) -> str:
    """Return the card of a model, with all that its run folder tells; `run`: None for an adapter without a run.

    Raises: ValueError when huggingface_hub rejects the card's metadata.
    """
    from huggingface_hub import ModelCard

    rows, note = metadata.evaluation_rows(run) if run else ([], "")
    hub_id, license_ = metadata.base_hub_id(subject.base), metadata.license_of(subject.base)
    base = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{cell(metadata.shown_name(subject.base))}`"
    base = f"MEL-Lite's demo model, a 4-bit conversion of {base}" if subject.base == DEMO else base
    algorithm = (run.option("train.algorithm") or ("mel" if run.config else None)) if run else None
    text = (
        environment()
        .get_template("model_card.md")
        .render(
            metadata=_front_matter(subject, run, hub_id, license_),
            name=cell(subject.name),
            what=_WHAT[subject.kind].format(base=base),
            usage=_usage(subject, hub_id),
            held_out=metadata.shown_dataset(run.option("data.eval")) if run else "",
            measures=[[cell(each) for each in row] for row in rows],
            measures_note=note,
            conditions=run.after.conditions() if run and run.after else "",
            algorithm=_ALGORITHMS.get(str(algorithm), str(algorithm)) if algorithm else "not recorded",
            training=[(name, cell(value)) for name, value in (metadata.training_rows(run) if run else [])],
            funnel=figures.funnel_table(run) if run else [],
            leaks=_leaks(run) if run else None,
            uplift=_uplift(run) if run else None,
            heuristics=_heuristics(run) if run else [],
            fidelity=subject.export,
            machine=[(name, cell(value)) for name, value in _machine(run)],
            license_note=", its license included" if license_ else ". Its license was not found and applies, too",
        )
    )
    ModelCard(text)
    return text


def environment() -> Any:
    """Return jinja's environment for cards, which are Markdown: nothing is escaped."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip


def _front_matter(subject: Subject, run: Run | None, hub_id: str | None, license_: Mapping[str, str]) -> str:
    from huggingface_hub import ModelCardData

    data_id = metadata.dataset_hub_id(run.option("data.train")) if run else None
    lora = ("lora",) if subject.kind in (Kind.RUN, Kind.ADAPTER) else ()
    results = metadata.eval_results(run) if run else []
    known: dict[str, Any] = {
        "base_model": hub_id,
        "datasets": [data_id] if data_id else None,
        "library_name": _LIBRARY[subject.kind],
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*metadata.TAGS, *lora, *subject.tags])),
        "model_name": subject.name if results else None,
        "eval_results": results or None,
        "base_model_relation": _RELATION[subject.kind] if hub_id else None,
        **license_,
    }
    data = ModelCardData(**known)
    return f"---\n{data.to_yaml()}\n---"


def _usage(subject: Subject, hub_id: str | None) -> str:
    """Return the code that loads the model, as a fenced block."""
    here = "OWNER/NAME"
    if subject.kind is Kind.GGUF:
        return f"```bash\nllama-cli -m {subject.name}.gguf -cnv\n```"
    if subject.kind is Kind.MODEL:
        lines = ["from transformers import pipeline", "", f'generate = pipeline("text-generation", model="{here}")']
    else:
        folder = ', subfolder="adapter"' if subject.kind is Kind.RUN else ""
        base = hub_id or f"path/to/{metadata.shown_name(subject.base)}"
        lines = [
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")',
            f'model = PeftModel.from_pretrained(base, "{here}"{folder})',
            f'tokenizer = AutoTokenizer.from_pretrained("{here}"{folder})',
        ]  # fmt: skip
    return "\n".join(["```python", *lines, "```"])


def _leaks(run: Run) -> str | None:
    """Return how many parsed meta-experiences gave the answer away; None when none was parsed."""
    parsed = [row for row in run.lessons if row.status is not Status.UNPARSED]
    if not parsed:
        return None
    leaked = sum(row.status is Status.LEAKED for row in parsed)
    redacted = sum(row.redacted for row in parsed)
    also = f"; in {redacted} more the answer was cut out" if redacted else ""
    share = f"{leaked} of {len(parsed)} parsed ones ({leaked / len(parsed):.1%})"
    return f"{share} gave the answer away and were dropped{also}."


def _uplift(run: Run) -> str | None:
    found = figures.uplift(run)
    return found.as_points() if found else None


def _heuristics(run: Run) -> list[str]:
    kept = [row.heuristic for row in run.lessons if row.status is Status.KEPT and row.heuristic]
    return [fenced(text) for text in kept[-MOST_HEURISTICS:]]


def _machine(run: Run | None) -> list[tuple[str, str]]:
    """Return device, duration and versions, as (name, value)."""
    record = run.record if run else {}
    packages = record.get("packages")
    seconds = (sum(stage_seconds(record).values()) or sum(phase_seconds(run.rows).values())) if run else 0.0
    values = {
        "device": record.get("device"),
        "duration": figures.duration(seconds) if seconds else None,
        "MEL-Lite": record.get("mel_lite"),
        "Python": record.get("python"),
        **(packages if isinstance(packages, Mapping) else {}),
    }
    found = [(str(name), str(value)) for name, value in values.items() if value]
    return found or [("not recorded", "there is no run.json next to the weights")]


def cell(value: object) -> str:
    """Return text on one line that cannot end a table's cell or start HTML."""
    text = " ".join(printable(str(value)).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def fenced(text: str) -> str:
    """Return text that a model wrote as a block without Markdown or HTML, cut to `MOST_CHARACTERS`."""
    shown = printable(text).strip()
    shown = shown if len(shown) <= MOST_CHARACTERS else shown[: MOST_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}text\n{shown}\n{fence}"


# ---- folders ---------------------------------------------------------------------------------------------------------


def run_of(weights: Path) -> Run | None:
    """Return the run that weights in its folder come from; None when the folder above is no run.

    The evaluations of a run are those of its last weights, so a checkpoint's run has none.
    """
    try:
        run = read_run(weights.resolve().parent)
    except ConfigError:
        return None
    return run if weights.name in ("adapter", "model") else replace(run, before=None, after=None)


def write_run_cards(folder: Path) -> None:
    """Write the cards of a finished run: of its folder, and of the weights in it."""
    run = read_run(folder)
    base = str(run.option("model.name") or "unknown")
    for kind, name in ((Kind.ADAPTER, "adapter"), (Kind.MODEL, "model")):
        if (folder / name).is_dir():
            atomic_write_text(folder / name / "README.md", model_card(Subject(kind, run.name, base), run))
    kind = Kind.RUN if (folder / "adapter").is_dir() else Kind.MODEL
    atomic_write_text(folder / "README.md", model_card(Subject(kind, run.name, base), run))


def write_card_so_far(
    folder: Path, config: Mapping[str, Any], record: Mapping[str, Any], *,
    name: str | None = None, tags: Sequence[str] = (), with_lessons: bool = False,
) -> None:  # fmt: skip
    """Write the card of a run at a checkpoint, without evaluations: those before and after are not of these weights.

    Args:
        config: sections of the run's options, used where a script started it, so that there is no config.yaml. A
            section `lora` says that an adapter is trained.
        record: content of run.json, where there is none.
    """
    try:
        run = read_run(folder, lessons=with_lessons)
    except ConfigError:  # nothing was logged yet
        run = Run(folder, {}, {}, (), (), None, None, finished=False)
    run = replace(run, config=run.config or dict(config), record=run.record or dict(record), before=None, after=None)
    kind = Kind.RUN if run.config.get("lora") else Kind.MODEL
    base = str(run.option("model.name") or "unknown")
    atomic_write_text(folder / "README.md", model_card(Subject(kind, name or run.name, base, tags=tuple(tags)), run))
