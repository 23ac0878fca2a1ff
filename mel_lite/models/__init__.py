"""Base models, adapters and chat text."""
