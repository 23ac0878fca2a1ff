"""The parts around TRL's training step: rewards, packing, scoring, micro-batches, metrics."""
