"""A training run, from recipe to summary."""
