"""Plans of the presets, with some options changed."""

from __future__ import annotations

from typing import Any

from mel_lite.engines.choice import EngineChoice
from mel_lite.memory.plan import BUDGETS, Plan, plan, shape_for
from mel_lite.recipe import Recipe, resolve


def planned(gpu: str, *, pinned: tuple[str, ...] = (), **overrides: Any) -> tuple[Recipe, Plan]:
    """A preset's recipe, with keys such as `train__optim` changed, and its plan with transformers."""
    recipe = resolve(preset=gpu, overrides=[(key.replace("__", "."), value) for key, value in overrides.items()])
    return recipe, plan(recipe, shape_for(recipe), gpu=gpu, budget_bytes=BUDGETS[gpu], pinned=pinned)


def with_vllm(gpu: str, *, pinned: tuple[str, ...] = (), **overrides: Any) -> tuple[Recipe, Plan]:
    """The same with vLLM."""
    recipe = resolve(preset=gpu, overrides=[(key.replace("__", "."), value) for key, value in overrides.items()])
    engine = EngineChoice("unsloth", True, "test")
    options: dict[str, Any] = {"budget_bytes": BUDGETS[gpu], "pinned": pinned, "engine": engine}
    return recipe, plan(recipe, shape_for(recipe), gpu=gpu, **options)
