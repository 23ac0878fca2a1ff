"""`mel-lite probe`: before a run, measure on a few dozen prompts what it and its lessons would learn from.

Everything comes from a MELTrainer with the run's options, inside `train` before its first step: rollouts, verdicts,
lessons and the gradients of its own losses. No weight is changed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mel_lite.config import MELConfig
from mel_lite.engines import distributed
from mel_lite.errors import ConfigError, DataError
from mel_lite.files import atomic_write_text
from mel_lite.recipe import Recipe
from mel_lite.run.folder import run_folder
from mel_lite.run.probe.measure import measure
from mel_lite.run.probe.result import ProbeResult
from mel_lite.run.tasks import Tasks, load_run_tasks, run_tokenizer
from mel_lite.run.train import build_trainer, check
from mel_lite.seeds import prompt_hash
from mel_lite.types import ReplayCriterion

LEAST_PROMPTS = 12
"""Two lesson batches and four reference batches of two prompts."""
BATCHES = 6
"""Fewest batches; one in three gives lessons."""
RESULT = "probe.json"


def probe(recipe: Recipe, folder: Path, *, console: Console, prompts: int = 36, attempts: int = 4) -> ProbeResult:
    """Probe the run of a recipe, write `probe.json` and the lessons to the folder, and print tables and advice.

    Args: prompts: different prompts; `attempts`: replays per lesson, with it and without.
    Raises: MelLiteError subclasses for anything that the user can fix, most of them before a model is loaded.
    """
    if distributed.world() > 1:
        raise ConfigError("probe runs on one process. Start it without accelerate launch.")
    recipe, notes = _followed(recipe)
    args = check(recipe, folder)
    tokenizer = run_tokenizer(recipe)
    tasks = load_run_tasks(recipe, args, tokenizer)
    changed = replace(recipe, train=probe_options(recipe.train, args, prompts))
    probe_args = check(changed, folder)
    tasks = replace(tasks, train=_chosen(tasks, recipe, probe_args, prompts))
    with run_folder(folder, resume=False):
        for note in notes:
            console.print(escape(note))
        trainer = build_trainer(changed, probe_args, tokenizer, tasks, console)

        def report(doing: str) -> None:
            console.print(escape(doing), style="dim")

        result = measure(trainer, attempts=attempts, mel_weight=args.mel_weight, report=report)
        result = replace(result, model=recipe.model.name, dataset=recipe.data.train, notes=tuple(notes))
        atomic_write_text(folder / RESULT, result.to_json() + "\n")
    result.show(console)
    console.print(f"figures   {escape(str(folder / RESULT))}", soft_wrap=True)
    if result.lessons.written:
        console.print(f"lessons   mel-lite experiences list --run {escape(str(folder))}", soft_wrap=True)
    return result


def _followed(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return the recipe that the probe follows, and what it does not follow in the run's."""
    notes = []
    algorithm = recipe.train.get("algorithm", "mel")
    if algorithm != "mel" or recipe.train.get("meta_experience") is False:
        notes.append(f"algorithm={algorithm!r} is not followed: the probe measures what lessons would add to GRPO.")
    criterion = recipe.train.get("replay_criterion")
    if criterion == ReplayCriterion.SCORED:
        notes.append(
            f"replay_criterion={criterion!r} generates no replays in training. The probe replays all the same, to "
            "measure the uplift."
        )
    train = {key: value for key, value in recipe.train.items() if key != "meta_experience"}
    return replace(
        recipe,
        data=replace(recipe.data, eval=None, eval_split=None),
        export=replace(recipe.export, format=None),
        train={**train, "algorithm": "mel"},
    ), notes


def probe_options(train: Mapping[str, Any], args: MELConfig, prompts: int) -> dict[str, Any]:
    """Return a run's training options as the probe needs them.

    A generation batch has the run's number of prompts, or a sixth of the probe's if that is fewer. A micro-batch has no
    more rows than the run's, all of one prompt. Terms of the loss that are neither policy nor lessons are left out.
    """
    size = args.num_generations
    groups = min(args.generation_batch_size // size, prompts // BATCHES)
    rows = math.gcd(size, args.per_device_train_batch_size)
    own = {key: value for key, value in train.items() if key not in ("steps_per_generation", "generation_batch_size")}
    return {
        **own,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": groups * size // rows,
        "num_iterations": 1,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "router_aux_loss_coef": 0.0,
        "skip_zero_advantage": args.top_entropy_quantile == 1.0,
        "mel_weight": 1.0,
        "mel_decay_steps": 0,
        "save_strategy": "no",
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "log_completions": False,
        "report_to": "none",
    }


def _chosen(tasks: Tasks, recipe: Recipe, args: MELConfig, prompts: int) -> Any:
    """Return as many rows with different prompts as the probe needs, drawn by the run's seed. Raises: DataError."""
    groups = args.generation_batch_size // args.num_generations
    needed = prompts // groups * groups
    hashes = [prompt_hash(prompt) for prompt in tasks.train["prompt"]]
    first: dict[str, int] = {}
    for row in random.Random(args.seed).sample(range(len(hashes)), len(hashes)):
        first.setdefault(hashes[row], row)
    if len(first) < needed:
        fix = f"Pass --prompts {len(first)}" if len(first) >= LEAST_PROMPTS else f"Add rows ({LEAST_PROMPTS} at least)"
        raise DataError(
            f"{recipe.data.train!r} has {len(first)} different prompts that fit, but --prompts {prompts} needs "
            f"{needed}: lessons and the policy gradient must come from different ones. {fix}, or use another dataset."
        )
    return tasks.train.select(list(first.values())[:needed])


__all__ = ["LEAST_PROMPTS", "RESULT", "probe", "probe_options"]
