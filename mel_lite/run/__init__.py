"""One training run, from recipe to summary."""
