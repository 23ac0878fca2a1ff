"""Supervised warm start on formatted examples, before RL."""
