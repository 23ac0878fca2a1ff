"""Supervised fine-tuning on formatted examples before RL."""
