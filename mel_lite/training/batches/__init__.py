"""Rows of the training forward, rollouts and lessons: packed, and computed in parts that fit into memory."""
