"""`mel-lite bench step`: where the time, the tokens and the operations of a training step go."""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from mel_lite.engines import distributed
from mel_lite.errors import ConfigError
from mel_lite.recipe import Recipe
from mel_lite.run.operations import flop_counter
from mel_lite.run.tasks import load_run_tasks, run_tokenizer
from mel_lite.run.train import build_trainer, check
from mel_lite.types import Schedule

PHASES = {
    "rollout": ("rollout",),
    "verify": ("verify",),
    "analysis": ("analysis",),
    "replay": ("replay",),
    "scoring": ("scoring", "forks", "scored", "examine", "internalise", "rescore", "probe"),
    "forward/backward": ("update",),
    "optimizer": ("optimizer",),
    "checkpoint": ("checkpoint",),
    "other": ("",),
}
"""Rows of the table, and the phases of the trainer's clock that each sums up."""
WARM_UP = 2
"""Steps of the overlapped schedule before the first lessons are complete."""


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """What one phase took, per step."""

    phase: str
    seconds_s: float
    generated_tokens: float
    forward_tokens: float
    """Tokens through the model, padding included; a token recomputed in the backward counts once."""
    operations: float
    """Floating-point operations of products that PyTorch counts."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """The phases of a step."""

    model: str
    dataset: str
    steps: int
    phases: tuple[PhaseCost, ...]
    token_overhead: float | None = None
    """Generated tokens of analyses and replays over those of the rollouts; None without lessons."""
    time_overhead_s: float | None = None
    """Seconds per step that lessons took, without their rows in the update; None without lessons."""

    def to_json(self) -> str:
        """Return a JSON object: `model, dataset, steps, phases: [{phase, seconds_s, ...}]`, all per step."""
        return json.dumps(asdict(self), indent=1)

    @property
    def price(self) -> str:
        """One line on what lessons cost; empty without lessons."""
        if self.token_overhead is None or self.time_overhead_s is None:
            return ""
        whole_s = sum(each.seconds_s for each in self.phases)
        return (
            f"lessons: {self.token_overhead:.0%} more generated tokens than the rollouts, {self.time_overhead_s:.2f} s "
            f"({self.time_overhead_s / whole_s:.0%}) of the step, without their rows in the update"
        )

    def table(self) -> Table:
        """Return the phases with their shares of the time, for a terminal."""
        whole_s = sum(each.seconds_s for each in self.phases)
        table = Table(title=f"one step of {self.model} on {self.dataset}")
        table.add_column("phase")
        for name in ("s", "share", "generated tokens", "forward tokens", "GFLOP"):
            table.add_column(name, justify="right")
        for each in self.phases:
            table.add_row(
                each.phase, f"{each.seconds_s:.2f}", f"{each.seconds_s / whole_s:.0%}", f"{each.generated_tokens:.0f}",
                f"{each.forward_tokens:.0f}", f"{each.operations / 1e9:.1f}",
            )  # fmt: skip
        table.add_row("step", f"{whole_s:.2f}", "", *(f"{sum(column):.0f}" for column in self._totals()))
        return table

    def _totals(self) -> tuple[list[float], ...]:
        return (
            [each.generated_tokens for each in self.phases],
            [each.forward_tokens for each in self.phases],
            [each.operations / 1e9 for each in self.phases],
        )


class StepMeter(TrainerCallback):
    """Charges seconds, tokens and operations to the innermost phase of the trainer's clock."""

    def __init__(self, trainer: Any, counter: Any, *, warm_up: int = 0) -> None:
        """Measure after `warm_up` steps."""
        self._trainer, self._counter, self._warm_up = trainer, counter, warm_up
        self._forward_tokens = 0
        self._optimizer = ExitStack()
        self.costs: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
        self.logs: list[dict[str, Any]] = []
        trainer.clock.on_change = self.charge
        causal = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
        causal.base_model.register_forward_pre_hook(self._forward, with_kwargs=True)
        self._last = self._now()

    def charge(self, phase: str) -> None:
        """Charge what was spent since the last change to `phase`."""
        now = self._now()
        self.costs[phase] = [spent + b - a for spent, a, b in zip(self.costs[phase], self._last, now, strict=True)]
        self._last = now

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._last = self._now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._warm_up > 0:
            self.costs.clear()
            self.logs.clear()
            self._last = self._now()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if "mel/time_overhead_s" in (logs or {}):
            self.logs.append(dict(logs or {}))

    def mean(self, name: str) -> float | None:
        """Return the mean of a logged metric; None where it was not logged."""
        values = [log[name] for log in self.logs if name in log]
        return sum(values) / len(values) if values else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer.enter_context(self._trainer.clock("optimizer"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._optimizer.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.charge("")

    def _forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else next(iter(args), None)
        if ids is not None:
            self._forward_tokens += ids.numel()

    def _now(self) -> list[float]:
        tokens = self._trainer.engine.total_generated_tokens
        return [time.monotonic(), tokens, self._forward_tokens, self._counter.get_total_flops()]


def bench_step(recipe: Recipe, *, console: Console, steps: int = 1) -> StepCost:
    """Train a recipe for a few steps in a temporary folder and print where they went. No evaluation, no export.

    Every step saves a checkpoint. With the overlapped schedule two steps come first, after which lessons are in every
    stage. Raises: MelLiteError subclasses for what the user can fix.
    """
    if distributed.world() > 1:
        raise ConfigError("bench step runs on one process. Start it without accelerate launch.")
    warm_up = WARM_UP if recipe.train.get("mel_schedule") == Schedule.OVERLAP else 0
    train = {
        "max_steps": warm_up + steps,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "no",
        "report_to": "none",
    }
    recipe = replace(
        recipe,
        data=replace(recipe.data, eval=None, eval_split=None),
        export=replace(recipe.export, format=None),
        train={**recipe.train, **train, "push_to_hub": False, "load_best_model_at_end": False},
    )
    with tempfile.TemporaryDirectory() as folder:
        args = check(recipe, Path(folder))
        tokenizer = run_tokenizer(recipe)
        tasks = load_run_tasks(recipe, args, tokenizer)
        trainer = build_trainer(recipe, args, tokenizer, tasks, console)
        with flop_counter() as counter:
            meter = StepMeter(trainer, counter, warm_up=warm_up)
            trainer.add_callback(meter)
            trainer.train()
    phases = [
        PhaseCost(phase, *(sum(column) / steps for column in zip(*(meter.costs[name] for name in names), strict=True)))
        for phase, names in PHASES.items()
    ]
    assert set(meter.costs) <= {name for names in PHASES.values() for name in names}, sorted(meter.costs)
    overheads = meter.mean("mel/token_overhead"), meter.mean("mel/time_overhead_s")
    cost = StepCost(recipe.model.name, recipe.data.train, steps, tuple(phases), *overheads)
    console.print(cost.table())
    if cost.price:
        console.print(cost.price)
    return cost
