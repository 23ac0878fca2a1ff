"""From groups of rollouts to lessons, and what a lesson adds to the loss."""
