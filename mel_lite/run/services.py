"""Check before a model is loaded what a run needs from outside: trackers, the Hub, its base and its adapter."""

from __future__ import annotations

from typing import Any

from mel_lite.models.adapters import adapter_base, find_adapter
from mel_lite.models.load import check_weights
from mel_lite.recipe import Recipe
from mel_lite.training.services import check_outside


def check_services(recipe: Recipe, args: Any) -> None:
    """Check trackers, the Hub if the run is pushed there, the base's weights and the adapter to continue.

    Raises: ConfigError, ModelError.
    """
    check_outside(args)
    check_weights(recipe.model)
    if recipe.lora is not None and recipe.lora.start_from is not None:
        adapter_base(find_adapter(recipe.lora.start_from))
