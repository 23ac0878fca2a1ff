"""Tables of docs/performance.md on the price of lessons: from decode_model.py and results/lesson-price-cpu.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from price import decode_model
from price.decode_model import COMPUTE_SHARE, MEMORY_SHARE, POINTS, WORKLOADS, Workload

RESULT = Path(__file__).resolve().parents[1] / "results" / "lesson-price-cpu.json"


def check() -> str:
    """Return published and predicted tokens per second, and the largest error."""
    lines = ["| card, model | sequences | published tokens/s | predicted | error |", "|---|---|---|---|---|"]
    errors = []
    for each in POINTS:
        predicted = decode_model.predicted(each)
        errors.append(predicted / each.tokens_per_s - 1)
        lines.append(
            f"| [{each.card.name}, {each.model.name}]({each.source}) | {each.live} | {each.tokens_per_s:.0f} | "
            f"{predicted:.0f} | {errors[-1]:+.0%} |"
        )
    worst = max(map(abs, errors))
    return "\n".join([*lines, "", f"No prediction is off by more than {worst:.0%}."])


def constants() -> str:
    """Return the constants of the model in words."""
    load = Workload()
    card, model = load.card, load.model
    return (
        f"{card.name}: {card.bytes_per_s / 1e9:.0f} GB/s, of which decoding reaches {MEMORY_SHARE:.0%}, and "
        f"{card.flop_per_s / 1e12:.0f} TFLOP/s, of which prefill and update reach {COMPUTE_SHARE:.0%}. {model.name}: "
        f"{2 * model.weights / 1e9:.1f} GB of weights, {model.cache_bytes / 1024:.0f} KiB of cache per token. Prompts "
        f"of {load.prompt_tokens} tokens, completions uniform from a quarter of their bound; {load.mixed_share:.0%} of "
        f"the groups mixed, with one analysis of {load.analysis_tokens} tokens each; {load.leak_free_share:.0%} of "
        f"these replayed, {load.kept_share:.0%} of those trained on."
    )


def model() -> str:
    """Return seconds, and ratios of tokens and seconds to plain GRPO, per workload and arm."""
    lines = [
        "| step | arm | decoding s | prefill s | update s | step s | tokens / GRPO | step / GRPO |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, load in WORKLOADS.items():
        found = decode_model.costs(load)
        alone = found["GRPO"]
        for arm, cost in found.items():
            lines.append(
                f"| {name} | {arm} | {cost.decode_s:.1f} | {cost.prefill_s:.1f} | {cost.update_s:.1f} | "
                f"{cost.whole_s:.1f} | {cost.tokens / alone.tokens:.2f} | **{cost.whole_s / alone.whole_s:.2f}** |"
            )
    return "\n".join(lines)


def measured() -> str:
    """Return the measured CPU seconds per step of each arm: medians, and the ratio of medians to plain GRPO."""
    report = json.loads(RESULT.read_text(encoding="utf-8"))
    runs: dict[str, list[dict[str, Any]]] = report["runs"]

    def median(arm: str, name: str) -> float:
        return statistics.median(row.get(name, 0.0) for row in runs[arm])

    lines = [
        "| arm | CPU s per step (least to most) | sampling | update and the rest | generated tokens | "
        "lesson tokens / rollout tokens | step / GRPO |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, rows in runs.items():
        seconds = [row["cpu_s"] for row in rows]
        rest_s = statistics.median(row["cpu_s"] - row["sampling_cpu_s"] for row in rows)
        lines.append(
            f"| {arm} | {median(arm, 'cpu_s'):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
            f"{median(arm, 'sampling_cpu_s'):.2f} | {rest_s:.2f} | {median(arm, 'mel/generated_tokens'):.0f} | "
            f"{median(arm, 'mel/token_overhead'):.2f} | **{median(arm, 'cpu_s') / median('grpo', 'cpu_s'):.2f}** |"
        )
    case, machine = report["case"], report["machine"]
    setting = (
        f"{machine['processor']}, {machine['threads']} thread, torch {report['torch']}: random Qwen3 weights, "
        f"{case['layers']} layers, hidden size {case['hidden']}; {case['prompts']} prompts x {case['group_size']} "
        f"completions of {case['shortest_tokens']} to {case['longest_tokens']} tokens; {len(runs['grpo'])} steps per "
        f"arm in {case['rounds']} interleaved rounds. Medians."
    )
    return "\n".join([setting, "", *lines])


FIGURES: dict[str, Callable[[], str]] = {
    "price-check": check,
    "price-constants": constants,
    "price-model": model,
    "price-measured": measured,
}
