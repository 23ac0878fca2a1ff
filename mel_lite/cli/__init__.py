"""The `mel-lite` command."""
