"""Predict peak memory and search for settings that fit a card. Pure arithmetic: no tensors."""
