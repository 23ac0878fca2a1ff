"""The demo's warm-up: worked sums, slips made on purpose, analyses of them, and solving with such notes in the prompt.

Pure Python and seeded: `python -m demo_warmup examples.jsonl` writes the same bytes every time, until
the leak guard, which chooses among wordings, changes. README.md beside the shipped adapter (`mel_lite/demo_adapter`)
tells what was trained on such examples and what came of it.
"""
