"""Memory plans for the pages, computed by the planner; independent of the machine."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from mel_lite.engines.choice import planned_engine
from mel_lite.gpus import GPU_PRESETS
from mel_lite.memory.formulas import CONTEXT_BYTES, GIB
from mel_lite.memory.plan import BUDGETS, Plan, plan, shape_for
from mel_lite.memory.vllm import VLLMCard
from mel_lite.memory.workload import workload
from mel_lite.recipe import resolve
from mel_lite.run.display import plan_view

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ROWS: tuple[tuple[str, str | None], ...] = (
    ("12gb", None), ("16gb", None), ("24gb", None), ("24gb", "Qwen/Qwen3-14B-Base"), ("40gb", None), ("80gb", None),
)  # fmt: skip
WIDTH = 100


def planned(gpu: str, model: str | None, *, engine: str) -> tuple[Plan, str]:
    """Return the plan of a preset for its card, without looking at this machine, and a short name of its model."""
    options: list[tuple[str, Any]] = [("model.engine", engine)]
    recipe = resolve(preset=gpu, overrides=[*options, *([("model.name", model)] if model else [])])
    choice = planned_engine(recipe.model, recipe.lora, None)
    made = plan(recipe, shape_for(recipe), gpu=gpu, budget_bytes=BUDGETS[gpu], engine=choice)
    size = recipe.model.name.split("/")[1].removesuffix("-Base")
    return made, size + ("" if recipe.model.load_in_4bit else " (bfloat16)")


def shown() -> str:
    """Return the terminal output of `mel-lite plan --gpu 24gb`."""
    made, _ = planned("24gb", None, engine="auto")
    console = Console(width=WIDTH, file=io.StringIO(), record=True)
    console.print(plan_view(made))
    lines = (line.rstrip() for line in console.export_text().rstrip().splitlines())
    return "\n".join(["```text", *lines, "```"])


def cards() -> str:
    """Return a table of every preset: its cards as named in its file, its model, and the predicted peaks."""
    lines = [
        "| `--gpu` | cards | model | predicted peak with Unsloth and vLLM | with transformers |",
        "|---|---|---|---|---|",
    ]
    for gpu in dict.fromkeys(gpu for gpu, _ in ROWS):
        vllm, size = planned(gpu, None, engine="auto")
        alone, _ = planned(gpu, None, engine="hf")
        name, _, dtype = size.partition(" (")
        model = f"{name}, {dtype.rstrip(')') or '4-bit'}"
        lines.append(f"| `{gpu}` | {_card_names(gpu)} | {model} | {_peak(vllm)} | {_peak(alone)} |")
    return "\n".join(lines)


def _card_names(gpu: str) -> str:
    """Read the card names from the first line of a preset: `# 24 GB: RTX 3090, L4. Qwen3-8B in 4 bits.`"""
    first = (CONFIGS / f"{GPU_PRESETS[gpu]}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return first.partition(": ")[2].partition(". ")[0]


def what_fits() -> str:
    """Return a table of every preset with both engines, and of the largest model on 24 GB."""
    lines = [
        "| card | model | completions | vLLM's share | its cache | predicted peak with vLLM | tokens at once | cache "
        "tokens | with transformers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for gpu, model in ROWS:
        vllm, size = planned(gpu, model, engine="auto")
        alone, _ = planned(gpu, model, engine="hf")
        cells = (
            gpu.replace("gb", " GB"), size, f"{alone.choices['train.max_completion_length']:,}",
            f"{vllm.choices['model.gpu_memory_utilization']:.2f}", f"{_cache_tokens(gpu, model, vllm):,}", _peak(vllm),
            f"{alone.choices['train.max_micro_batch_tokens']:,}", f"{alone.choices['train.max_cache_tokens']:,}",
            _peak(alone),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _peak(made: Plan) -> str:
    return f"{made.peak_bytes / GIB:.1f} of {made.budget_bytes / GIB:.1f} GiB ({made.worst.name})"


def _cache_tokens(gpu: str, model: str | None, made: Plan) -> int:
    chosen = [(key, value) for key, value in made.choices.items() if key.startswith(("train.", "model."))]
    recipe = resolve(preset=gpu, overrides=[*chosen, *([("model.name", model)] if model else [])])
    card = VLLMCard(BUDGETS[gpu], BUDGETS[gpu] - CONTEXT_BYTES)
    return workload(recipe, shape_for(recipe), vllm_on=card).vllm_cache_tokens
