"""Load task files and datasets into rows of prompt and answer."""

from mel_lite.data.tasks import load_tasks, recommended_verifier

__all__ = ["load_tasks", "recommended_verifier"]
