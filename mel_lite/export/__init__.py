"""Export trained adapters as adapter folders, merged models or GGUF files, checked for fidelity."""
