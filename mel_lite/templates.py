"""Public API of prompts: the renderer of all prompts, and the texts of analysis and replay (option `templates`)."""

from __future__ import annotations

from mel_lite.lessons.prompts import Templates, load_templates
from mel_lite.models.chat import render

__all__ = ["Templates", "load_templates", "render"]
