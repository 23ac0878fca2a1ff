"""Base models, LoRA adapters and chat text."""
