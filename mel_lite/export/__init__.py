"""Write trained adapters as merged models, checked for fidelity."""
