"""Report of an export: its fidelity figures as a table, a JSON file and a model card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mel_lite.export.gguf import GGUF_TYPES
from mel_lite.hub.model_card import Kind, Subject, model_card, run_of
from mel_lite.models.load import ModelSpec

if TYPE_CHECKING:
    from rich.table import Table

REPORT = "export_report.json"
MEAN_KL_LIMIT_NATS = 1e-3
TOP1_LIMIT = 0.995


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Comparison of a merged model with the adapter model, on the check prompts and the adapter model's own answers."""

    tokens: int
    mean_kl_nats: float
    """Mean over tokens of KL(adapter || merged) of the next-token distributions, in nats per token, >= 0."""
    max_kl_nats: float
    top1_agreement: float
    """Share of positions at which both models rank the same next token first, in [0, 1]."""
    greedy_equal: tuple[bool, ...]
    """True for each check prompt for which both models give the same greedy answer."""

    @property
    def is_faithful(self) -> bool:
        """True if mean KL and top-1 agreement are within the limits. NaN is not."""
        return self.mean_kl_nats <= MEAN_KL_LIMIT_NATS and self.top1_agreement >= TOP1_LIMIT


@dataclass(frozen=True, slots=True)
class ExportReport:
    """Exported files and their fidelity."""

    path: Path
    format: str
    adapter: Path
    base: ModelSpec
    """Base model and how it was loaded in training."""
    dtype: str | None
    """Dtype of the merged weights; None for `adapter`."""
    fidelity: Fidelity | None
    """None for `adapter`, which is a copy."""

    def to_json(self) -> str:
        """Return all figures as a JSON object."""
        values = asdict(self) | {"path": self.path.name, "adapter": self.adapter.name}
        values["limits"] = {"mean_kl_nats": MEAN_KL_LIMIT_NATS, "top1_agreement": TOP1_LIMIT}
        return json.dumps(values, indent=1)

    def as_table(self) -> Table:
        """Return the figures as a rich table."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"export: {self.format}", show_header=False)
        table.add_row("folder", escape(str(self.path)))
        quantization = f", {self.base.quant_type} 4-bit" if self.base.load_in_4bit else ""
        table.add_row("base in training", f"{escape(self.base.name)} ({self.base.dtype}{quantization})")
        if self.fidelity is None:
            return table
        found = self.fidelity
        table.add_row("weights", self.dtype)
        table.add_row("mean KL", f"{found.mean_kl_nats:.1e} nats/token (limit {MEAN_KL_LIMIT_NATS:.0e})")
        table.add_row("max KL", f"{found.max_kl_nats:.1e} nats")
        table.add_row("same top token", f"{found.top1_agreement:.2%} of {found.tokens} (limit {TOP1_LIMIT:.1%})")
        table.add_row("same greedy answer", f"{sum(found.greedy_equal)} of {len(found.greedy_equal)} prompts")
        verdict = "[green]faithful[/]" if found.is_faithful else "[red]differs: serve the adapter on its base[/]"
        table.add_row("merged vs adapter", verdict)
        return table


def card(report: ExportReport) -> str:
    """Return the model card of an export, with what the run of its adapter tells."""
    kind = Kind.GGUF if report.format in GGUF_TYPES else Kind.ADAPTER if report.fidelity is None else Kind.MODEL
    run = run_of(report.adapter)
    name = run.name if run else report.path.resolve().name
    if kind is Kind.GGUF:
        name = f"{Path(report.base.name).name.lower()}-{report.format}"
    text = ""
    if report.fidelity is not None:
        text = (
            f"Base and LoRA update merged in float32 and rounded once to {report.dtype}. Compared with the adapter "
            f"model over {report.fidelity.tokens} tokens: mean KL {report.fidelity.mean_kl_nats:.1e} nats/token, same "
            f"top token {report.fidelity.top1_agreement:.2%}; all figures in `{REPORT}`."
        )
    if kind is Kind.GGUF:
        text += f" Then converted to {report.format} by llama.cpp; the figures do not cover this step."
    return model_card(Subject(kind, name, report.base.name, export=text), run)
