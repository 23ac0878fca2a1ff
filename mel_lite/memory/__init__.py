"""Predict peak memory and choose settings that fit a card. Pure arithmetic: no tensors."""
