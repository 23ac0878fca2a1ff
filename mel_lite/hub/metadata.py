"""The part of a card that the Hub reads: ids of base and data, license, tags, evaluation results."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mel_lite.data.held_out import HELD_OUT
from mel_lite.models.adapters import hub_id_of
from mel_lite.models.origin import DEMO
from mel_lite.report import figures
from mel_lite.report.runs import Run

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from mel_lite.evaluate import Interval
    from mel_lite.intervals import Estimate

DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TAGS = ("mel-lite", "mel", "meta-experience-learning", "grpo", "trl", "reinforcement-learning", "arxiv:2602.10224")
LOOKUP_TIMEOUT_S = 5.0
_FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def base_hub_id(name: str | None) -> str | None:
    """Return the Hub id of a base model; None for a local folder. The demo model is a conversion of its own."""
    return DEMO_HUB_ID if name == DEMO else hub_id_of(name or "")


def shown_name(name: str | None) -> str:
    """Return a model or dataset as a card may show it: a Hub id as it is, of a path the last part only."""
    text = str(name or "unknown")
    return base_hub_id(text) or Path(text).name or "unknown"


def dataset_hub_id(spec: str | None) -> str | None:
    """Return the Hub id in a dataset spec; None for a file, a folder, the demo and generated tasks."""
    name = (spec or "").partition(":")[0]
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith(_FILES) and not Path(name).exists()
    return name if is_id else None


def shown_dataset(spec: str | None) -> str:
    """Return a dataset as a card may show it, without a local path."""
    text = str(spec or "unknown")
    if text == HELD_OUT:
        return "held-out training tasks"
    is_name = dataset_hub_id(text) or text.partition(":")[0] in (DEMO, "reasoning-gym")
    return text if is_name else Path(text).name


@functools.cache
def license_of(base: str | None) -> dict[str, str]:
    """Return `license`, `license_name` and `license_link` of a base model's own card, as far as they are known.

    Looks into the base's folder, then into the Hub cache, then asks the Hub once, unless it is offline.
    """
    from huggingface_hub import ModelCard, constants, model_info, try_to_load_from_cache

    if base == DEMO:
        return {"license": "apache-2.0"}
    hub_id = hub_id_of(base or "")
    readme = Path(base or "") / "README.md"
    try:
        if hub_id is not None and isinstance(cached := try_to_load_from_cache(hub_id, "README.md"), str):
            readme = Path(cached)
        if readme.is_file():
            data: Any = ModelCard.load(readme, ignore_metadata_errors=True).data
        elif hub_id is None or constants.HF_HUB_OFFLINE:
            return {}
        else:
            data = model_info(hub_id, timeout=LOOKUP_TIMEOUT_S).card_data or {}
    except Exception:  # no network, a private base, an unreadable card: the license is then not known
        return {}
    found = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in found.items() if isinstance(value, str) and found["license"]}


def eval_results(run: Run) -> list[EvalResult]:
    """Return the evaluation after training as the Hub's model index takes it: shares in [0, 1] with intervals."""
    from huggingface_hub import EvalResult

    after, spec = run.after, run.option("data.eval")
    if after is None:
        return []
    conditions: dict[str, Any] = {
        "tasks": after.n,
        "samples_per_task": after.samples,
        "temperature": after.temperature,
        "max_new_tokens": after.max_new_tokens,
        "seed": after.seed,
    }
    measured, _ = figures.evaluation(run.before, run.after)
    found: list[Estimate | Interval] = [one.after for one in measured]
    kinds = (("pass@1", "Pass@1 (greedy)"), ("accuracy", f"Avg@{after.k}"), (f"pass@{after.k}", f"Pass@{after.k}"))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset_hub_id(spec) or "custom",
            dataset_name=shown_dataset(spec) if spec else "held-out tasks",
            dataset_split=run.option("data.eval_split"),
            metric_type=kind,
            metric_name=f"{name}, share of tasks",
            metric_value=round(one.value, 4),
            metric_args=conditions | {"interval_95": [round(one.low, 4), round(one.high, 4)]},
        )
        for (kind, name), one in zip(kinds, found or [after.pass_at_1, after.avg_at_k, after.pass_at_k], strict=True)
    ]


def training_rows(run: Run) -> list[tuple[str, str]]:
    """Return the settings of a run that a reader asks for first, as (name, value); unknown ones are left out."""
    lora = run.config.get("lora") or {}
    start = lora.get("start_from")
    values = {
        "tasks": shown_dataset(run.option("data.train")) if run.option("data.train") else None,
        "verifier": run.option("train.verifier"),
        "algorithm": run.option("train.algorithm") or ("mel" if run.config else None),
        "lessons enter by": run.option("train.internalisation"),
        "steps": run.steps or None,
        "completions per prompt": run.option("train.num_generations"),
        "longest completion (tokens)": run.option("train.max_completion_length"),
        "learning rate": run.option("train.learning_rate"),
        "LoRA rank, alpha": f"{lora['r']}, {lora['alpha']}" if {"r", "alpha"} <= lora.keys() else None,
        "base in 4 bits": run.option("model.load_in_4bit") or None,
        "started from adapter": (start if start == DEMO else shown_name(start)) if start else None,
        "seed": run.option("train.seed"),
    }
    return [(name, str(value)) for name, value in values.items() if value is not None]


def evaluation_rows(run: Run) -> tuple[list[tuple[str, str, str, str]], str]:
    """Return name, before, after and change of each measure with 95 % intervals, and a note; no rows without any."""
    found, warning = figures.evaluation(run.before, run.after)
    rows = [
        (one.name, one.before.as_share(), one.after.as_share(), one.change.as_points() if one.change else "not paired")
        for one in found
    ]
    if run.after is not None and not rows:
        only = run.after
        names = {"Pass@1 (greedy)": only.pass_at_1, f"Avg@{only.k}": only.avg_at_k, f"Pass@{only.k}": only.pass_at_k}
        rows = [(name, "not measured", str(value), "") for name, value in names.items()]
    return rows, warning
