"""Keep a long run alive: checkpoints, resume, signals, non-finite updates, collapse."""
