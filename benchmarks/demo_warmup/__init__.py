"""Warm-up examples of the demo: solving, analyses of pairs, and solving with such notes in the prompt.

`PYTHONPATH=benchmarks python -m demo_warmup FILE.jsonl`, from the repository root, writes the same bytes every time.
They change only with the leak guard, which selects among pairs. The README.md of the shipped adapter
(`mel_lite/models/demo_adapter`) describes the training on these examples and its results.
"""
