"""Check before a model is loaded what a run depends on: trackers, the Hub, its base and its adapter."""

from __future__ import annotations

from typing import Any

from mel_lite.models.adapters import adapter_base, find_adapter
from mel_lite.models.load import check_weights
from mel_lite.recipe import Recipe
from mel_lite.training.services import check_services


def check_dependencies(recipe: Recipe, args: Any) -> None:
    """Check trackers, the Hub if the run is pushed there, the base's weights and the adapter to continue.

    Raises: ConfigError, ModelError.
    """
    check_services(args)
    check_weights(recipe.model)
    if recipe.lora is not None and recipe.lora.start_from is not None:
        adapter_base(find_adapter(recipe.lora.start_from))
