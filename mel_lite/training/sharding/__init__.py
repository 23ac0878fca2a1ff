"""Weights and gradients that are spread over processes (FSDP2, DeepSpeed)."""
