"""Write figures from benchmarks/results/*.json and from the planner into the pages: `python benchmarks/tables.py`.

A page marks the place with `<!-- figures NAME -->` and `<!-- /figures -->`; NAME is a key of FIGURES. With `--check`
nothing is written, and the exit code is 1 if a page differs from the figures.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import demo_figures
import plan_figures
import probe
from learning import learning_figures
from mel_lite.kernels.bench.report import OURS, SAMPLED
from peer_suite import suite
from price import price_figures
from speed import step_figures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/kernels.md",
    "docs/learning.md",
    "docs/learning-rounds.md",
    "docs/tuning.md",
    "docs/memory.md",
    "docs/method.md",
    "docs/performance.md",
    "docs/probe.md",
    "docs/status.md",
    "docs/which-card.md",
    "mel_lite/models/demo_adapter/README.md",
)
RETIRED = ("mel_lite, whole loss",)
"""Contenders in the raw results whose code was deleted."""
MARK = re.compile(r"(<!-- figures (?P<name>[\w-]+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def _read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _spread_s(times_s: list[float]) -> str:
    return f"{statistics.median(times_s):.2f} ({min(times_s):.2f} to {max(times_s):.2f})"


def kernel_cpu(name: str, clock: str) -> str:
    """Return time, memory and errors of every contender that ran, per shape; `clock` is the key of the times."""
    report = _read(name)
    machine, versions = report["machine"], report["versions"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    parts = [
        f"{machine['processor']}, {threads}, torch {versions['torch']}; median of "
        f"{report['rounds']} interleaved rounds (least to most), forward and backward; memory beyond the inputs, with "
        "the gradient."
    ]
    unit = "CPU s" if clock == "cpu_times_s" else "s"
    for shape in report["shapes"]:
        kl = shape.get("operator") == "kl"
        parts.append(
            f"\nN {shape['rows']}, H {shape['width']}, V {shape['vocab']}, {shape['dtype']}, {shape['states']} states"
            f"{', KL from a teacher' if kl else ''}:"
            f"\n\n| | {unit} | peak MiB | error of {'KL' if kl else 'logp'} | error of u |\n|---|---|---|---|---|"
        )
        for result in shape["results"]:
            if result["times_s"] and result["name"] not in RETIRED:
                errors = ["" if result[key] is None else f"{result[key]:.1e}" for key in ("logp_error", "u_error")]
                memory = f"{(result['peak_bytes'] or 0) / 2**20:.0f}"
                parts.append(f"| {result['name']} | {_spread_s(result[clock])} | {memory} | {' | '.join(errors)} |")
    absent = sorted({r["name"] for shape in report["shapes"] for r in shape["results"] if r["problem"]})
    if absent:
        parts.append(f"\nNot on this machine: {', '.join(absent)}.")
    return "\n".join(parts)


def kernel_cpu_line() -> str:
    """Compare the operator with naive log-softmax in one sentence, on the first shape."""
    report = _read("kernel-cpu")
    shape = report["shapes"][0]
    by_name = {result["name"]: result for result in shape["results"]}
    ours, naive = by_name["mel_lite"], by_name["naive log-softmax"]
    ours_s, naive_s = statistics.median(ours["times_s"]), statistics.median(naive["times_s"])
    return (
        f"On {report['machine']['threads']} CPU threads, at {shape['rows']} tokens and a vocabulary of "
        f"{shape['vocab']}, it takes {ours_s:.1f} s and {ours['peak_bytes'] / 2**20:.0f} MiB where full logits take "
        f"{naive_s:.1f} s and {naive['peak_bytes'] / 2**20:.0f} MiB: {naive_s / ours_s:.1f} times as fast."
    )


def kernel_kl_line() -> str:
    """Compare the KL operator with two full logits, and with the estimate by the sampled token, in one sentence."""
    shape = _read("kernel-kl-cpu")["shapes"][0]
    by_name = {result["name"]: result for result in shape["results"]}
    ours, naive, sampled = (by_name[name] for name in (OURS, "naive KL of two logits", SAMPLED))
    ours_s, naive_s, sampled_s = (statistics.median(each["cpu_times_s"]) for each in (ours, naive, sampled))
    return (
        f"At {shape['rows']} tokens and a vocabulary of {shape['vocab']}, it takes {ours_s:.1f} CPU seconds and "
        f"{ours['peak_bytes'] / 2**20:.0f} MiB where both full logits take {naive_s:.1f} and "
        f"{naive['peak_bytes'] / 2**20:.0f} MiB. The estimate by the sampled token takes {sampled_s:.1f}."
    )


def mass() -> str:
    """Return the number of tokens that hold the mass of the second product, and the errors of keeping fewer."""
    report = _read("mass")
    lines = [
        "| temperature | tokens kept | mass dropped, mean | rows losing over 1 % | error of u, all rows | median row "
        "| p90 row |",
        "|---|---|---|---|---|---|---|",
    ]
    for curve in report["curves"]:
        lines += [
            f"| {curve['temperature']} | {k['tokens']} | {k['mass_dropped_mean']:.3f} | "
            f"{k['rows_losing_over_1_percent']:.0%} | {k['u_error_all_rows']:.1e} | {k['u_error_median_row']:.1e} | "
            f"{k['u_error_p90_row']:.1e} |"
            for k in curve["keep"]
        ]
    lines += ["", "| temperature | mass lost at most | tokens needed: quartiles, p90 | mean |", "|---|---|---|---|"]
    for curve in report["curves"]:
        lines += [
            f"| {curve['temperature']} | {low['share']:g} | {', '.join(map(str, low['tokens_quartiles_and_p90']))} | "
            f"{low['tokens_mean']:.0f} |"
            for low in curve["lose"]
        ]
    rows = ", ".join(f"{c['rows']} rows at {c['temperature']}" for c in report["curves"])
    return "\n".join([f"{report['model']}, {report['tasks']}: {rows}.", "", *lines])


def retrieval() -> str:
    """Return precision and recall of the lexical retrieval, next to a random draw from the same bank."""
    report = _read("retrieval")
    lines = [
        "| bank | lessons | questions | precision at 1 | at 3 | at 8 | recall | random | better at 8, points |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        precision, better = case["precision"], case["precision"][-1]["better"]
        shares = [each["value"] for each in precision] + [case["recall"]["value"], precision[-1]["random"]]
        interval = f"{100 * better['value']:+.1f} [{100 * better['low']:+.1f}, {100 * better['high']:+.1f}]"
        counts = f"{case['lessons']} | {case['questions']}"
        lines.append(f"| {case['case']} | {counts} | {' | '.join(f'{share:.1%}' for share in shares)} | {interval} |")
    matched = sum(each["matched"] for each in report["foreign"])
    asked = sum(each["questions"] for each in report["foreign"])
    return "\n".join(
        [*lines, "", f"Questions of another kind than the bank's got a lesson in {matched} of {asked} cases."]
    )


def peer_suite() -> str:
    """Return the counts of TRL's own tests with both classes, and why MELTrainer fails where TRL's class passes."""
    report = _read("peer-suite")
    known, found = report["conditions"], report["outcomes"]
    lines = [
        f"Tests of TRL {known['tests of TRL']} on TRL {known['trl']}, transformers {known['transformers']}, torch "
        f"{known['torch']}, Python {known['python']}:",
        "",
        "| class | passed | failed | skipped |",
        "|---|---|---|---|",
    ]
    for name, tests in found.items():
        counts = suite.counts(tests)
        lines.append(f"| {name} | {counts['passed']} | {counts['failed']} | {counts['skipped']} |")
    theirs, ours = (found[name] for name in suite.CLASSES)
    only = suite.only_passed(theirs, ours)
    reasons = collections.Counter(reason.rpartition("errors.")[2].partition(". ")[0] for reason in only.values())
    lines += ["", f"{suite.CLASSES[0]} alone passes {len(only)}; {suite.CLASSES[1]} says there:", ""]
    lines += [f"- {count} x `{reason}`" for reason, count in reasons.most_common()]
    also = suite.only_passed(ours, theirs)
    return "\n".join([*lines, "", f"{suite.CLASSES[1]} alone passes {len(also)}."])


FIGURES: dict[str, Callable[[], str]] = {
    "kernel-cpu": partial(kernel_cpu, "kernel-cpu", "times_s"),
    "kernel-kl-cpu-line": kernel_kl_line,
    "kernel-kl-cpu": partial(kernel_cpu, "kernel-kl-cpu", "cpu_times_s"),
    "kernel-cpu-line": kernel_cpu_line,
    "mass": mass,
    "retrieval": retrieval,
    "peer-suite": peer_suite,
    "demo-warmup": demo_figures.warmup,
    "demo-arms": demo_figures.arms,
    "demo-tuning": demo_figures.tuning,
    "updates-line": demo_figures.updates,
    "learning-top": learning_figures.top,
    **{
        f"learning-{name}-{subject}": partial(figures, subject)
        for subject in learning_figures.SUBJECTS
        for name, figures in (("summary", learning_figures.summary), ("subject", learning_figures.subject))
    },
    **{
        f"learning-{name}-{regime}": partial(figures, regime)
        for regime in learning_figures.REGIMES
        for name, figures in learning_figures.TABLES.items()
    },
    **step_figures.FIGURES,
    **price_figures.FIGURES,
    "probe-demo": partial(probe.shown, "demo"),
    "probe-random": partial(probe.shown, "random"),
    "cards": plan_figures.cards,
    "plan": plan_figures.shown,
    "plan-what-fits": plan_figures.what_fits,
}


def filled(text: str) -> str:
    """Fill every marked place of a page from the raw results. Raises: KeyError for an unknown name."""
    return MARK.sub(lambda match: f"{match[1]}{FIGURES[match['name']]()}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            stale.append(page)
            if not check:
                (ROOT / page).write_text(new, encoding="utf-8")
    if check and stale:
        sys.exit(
            f"{', '.join(stale)}: not the figures of benchmarks/results or the planner; run python benchmarks/tables.py"
        )


if __name__ == "__main__":
    main()
