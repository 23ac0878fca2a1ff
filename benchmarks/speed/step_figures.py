"""Tables of docs/performance.md, from the raw results in benchmarks/results/.

`PYTHONPATH=benchmarks python -m speed.step_figures` draws docs/images/scaling.png (needs matplotlib).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
PLOT = RESULTS.parents[1] / "docs" / "images" / "scaling.png"
MEASURES = {"operations": ("GFLOP", 1e9), "cpu_s": ("CPU s", 1.0), "peak_bytes": ("peak GiB", 2**30)}
"""Measured quantities by field: name, and units in one of it."""
GIB = 2**30
HEAD = (
    "| case | flat groups | GFLOP | ratio | CPU s | ratio | peak GiB | ratio | gradient difference |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
SHAPE = ("groups", "group_size", "shortest_tokens", "longest_tokens", "layers", "hidden", "vocab")


def _cases() -> list[dict[str, Any]]:
    report = json.loads((RESULTS / "step-cpu.json").read_text(encoding="utf-8"))
    return [each for each in report["cases"] if each["runs"]["trl"]]


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median of a figure over runs."""
    return statistics.median(run[key] for run in runs)


def _named(case: dict[str, Any]) -> str:
    shortest, longest = case["shortest_tokens"], case["longest_tokens"]
    lengths = f"{longest}" if shortest == longest else f"{shortest} to {longest}"
    rows = f"{case['groups']} x {case['group_size']} completions of {lengths}"
    model = "SmolLM2-135M" if case["model"] == "smollm2-135m" else f"Qwen3, {case['layers']} layers, H {case['hidden']}"
    extra = f", V {case['vocab']}" if case["model"] == "qwen3" else ""
    return f"{model}{extra}: {rows}{', gradient checkpointing' if case['checkpointing'] else ''}"


def _row(found: dict[str, Any], label: str) -> str:
    theirs, ours = found["runs"]["trl"], found["runs"]["mel"]
    cells = []
    for key, (_, unit) in MEASURES.items():
        a, b = median(theirs, key), median(ours, key)
        digits = 1 if key == "operations" else 2
        cells += [f"{a / unit:.{digits}f} / {b / unit:.{digits}f}", f"**{b / a:.2f}**"]
    case = found["case"]
    return (
        f"| {label} | {case['flat_groups']} of {case['groups']} | {' | '.join(cells)} | {found['gradient_error']:.0e} |"
    )


def _is_target(case: dict[str, Any]) -> bool:
    return case["model"] == "smollm2-135m" or case["layers"] == 4


def targets() -> str:
    """Return TRL / MEL-Lite and the ratio, per case."""
    lines = [_row(each, _named(each["case"])) for each in _cases() if _is_target(each["case"])]
    return "\n".join([HEAD, *lines])


SCALES = {
    "group_size": "group size",
    "longest_tokens": "longest completion, tokens",
    "vocab": "vocabulary",
    "hidden": "hidden size",
    "groups": "prompts of a step",
}


def family(key: str) -> list[dict[str, Any]]:
    """Return the largest set of cases that differ in one dimension only, by its value."""
    others = sorted(name for name in SHAPE if name != key)
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in _cases():
        if not _is_target(each["case"]):
            families.setdefault(tuple(each["case"][name] for name in others), []).append(each)
    return sorted(max(families.values(), key=len, default=[]), key=lambda each: each["case"][key])


def scaling() -> str:
    """Return one table per dimension that a case set varies."""
    tables = []
    for key, title in SCALES.items():
        if len(cases := family(key)) > 1:
            rows = [_row(each, f"{each['case'][key]}") for each in cases]
            tables.append("\n".join([HEAD.replace("| case |", f"| {title} |"), *rows]))
    return "\n\n".join(tables)


def conditions() -> str:
    """Return versions and machine of the measurements."""
    report = json.loads((RESULTS / "step-cpu.json").read_text(encoding="utf-8"))
    found = report["cases"][0]["runs"]
    ours, theirs = found["mel"][0]["versions"], found["trl"][0]["versions"]
    return (
        f"{report['machine']['processor']}, {report['machine']['threads']} thread, float32, LoRA of rank 8 on all "
        f"linear layers; TRL {theirs['trl']}, MEL-Lite on TRL {ours['trl']}, torch {ours['torch']}, transformers "
        f"{ours['transformers']}. Each figure is from a process of its own."
    )


def generation() -> str:
    """Return tokens per CPU second of both engines on the demo's workload."""
    report = json.loads((RESULTS / "generation-cpu.json").read_text(encoding="utf-8"))
    lines = ["| | tokens | CPU s | tokens per CPU s | GFLOP per token | peak GiB |", "|---|---|---|---|---|---|"]
    rates = {}
    for who, name in (("trl", "TRL"), ("mel", "MEL-Lite")):
        runs = report["runs"][who]
        timed = [run for run in runs if "cpu_s" in run]
        rates[who] = statistics.median(run["tokens"] / run["cpu_s"] for run in timed)
        cost = statistics.median(run["operations"] / run["tokens"] for run in runs if "operations" in run) / 1e9
        figures = [f"{median(timed, 'tokens'):.0f}", f"{median(timed, 'cpu_s'):.1f}", f"{rates[who]:.1f}"]
        lines.append(f"| {name} | {' | '.join(figures)} | {cost:.2f} | {median(runs, 'peak_bytes') / GIB:.2f} |")
    ratio = rates["mel"] / rates["trl"]
    return "\n".join([*lines, "", f"MEL-Lite samples {ratio:.1f} times the tokens per CPU second."])


def startup() -> str:
    """Return CPU seconds and modules of each program."""
    runs = json.loads((RESULTS / "startup-cpu.json").read_text(encoding="utf-8"))["runs"]
    names = {
        "import": "`import mel_lite`",
        "help": "`mel-lite --help`",
        "import-bare": "transformers' classes: import",
        "import-peft": "PEFT, which brings them: import",
        "import-trl": "TRL's trainer, which brings both: import",
        "import-mel": "MEL-Lite's run, which brings all: import",
        "bare": "transformers alone, one token",
        "trl": "TRL's trainer, first token",
        "mel": "`mel-lite train --gpu cpu`, first token",
    }
    lines = ["| | CPU s | modules |", "|---|---|---|"]
    for who, name in names.items():
        lines.append(f"| {name} | {median(runs[who], 'cpu_s'):.2f} | {median(runs[who], 'modules'):.0f} |")
    spent = {who: median(runs[who], "cpu_s") for who in names}
    note = (
        f"To the first token, TRL takes {spent['trl'] / spent['bare']:.2f} times as long as transformers, MEL-Lite "
        f"{spent['mel'] / spent['bare']:.2f} times. The import of TRL's trainer alone takes "
        f"{spent['import-trl'] / spent['bare']:.2f} times as long, that of MEL-Lite's run, which contains it, "
        f"{spent['import-mel'] / spent['bare']:.2f} times."
    )
    return "\n".join([*lines, "", note])


def phases() -> str:
    """Return the table of `mel-lite bench step` on the demo, from its --json."""
    report = json.loads((RESULTS / "bench-step-cpu.json").read_text(encoding="utf-8"))
    found = report["phases"]
    whole_s = sum(each["seconds_s"] for each in found)
    lines = ["| phase | share of the time | generated tokens | forward tokens | GFLOP |", "|---|---|---|---|---|"]
    for each in found:
        tokens = f"{each['generated_tokens']:.0f} | {each['forward_tokens']:.0f}"
        share = each["seconds_s"] / whole_s
        lines.append(f"| {each['phase']} | {share:.0%} | {tokens} | {each['operations'] / 1e9:.1f} |")
    return "\n".join(lines)


FIGURES: dict[str, Callable[[], str]] = {
    "step-conditions": conditions,
    "step-targets": targets,
    "step-scaling": scaling,
    "generation": generation,
    "startup": startup,
    "phases": phases,
}


def draw() -> None:
    """Draw every measure against every dimension that a case set varies, for both trainers."""
    from matplotlib import pyplot

    shown = {key: found for key in SCALES if len(found := family(key)) > 1}
    figure, axes = pyplot.subplots(
        len(MEASURES), len(shown), figsize=(2.6 * len(shown), 2.0 * len(MEASURES)), sharex="col", layout="constrained"
    )
    for row, (measure, (name, unit)) in zip(axes, MEASURES.items(), strict=True):
        for axis, (key, cases) in zip(row, shown.items(), strict=True):
            x = [each["case"][key] for each in cases]
            for who, label in (("trl", "TRL"), ("mel", "MEL-Lite")):
                axis.plot(x, [median(each["runs"][who], measure) / unit for each in cases], marker="o", label=label)
            axis.set(xscale="log", xticks=x, xticklabels=[f"{value:,}" for value in x])
            axis.set_ylim(bottom=0)
            axis.minorticks_off()
        row[0].set_ylabel(name)
    for axis, key in zip(axes[-1], shown, strict=True):
        axis.set_xlabel(SCALES[key])
    axes[0][0].legend()
    figure.savefig(PLOT, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    draw()
