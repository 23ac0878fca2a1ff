"""Write the examples of the shipped recipe: `PYTHONPATH=benchmarks python -m demo_warmup FILE.jsonl`."""

from __future__ import annotations

import sys
from pathlib import Path

from demo_warmup.lessons import write_examples

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: PYTHONPATH=benchmarks python -m demo_warmup FILE.jsonl")
    print(f"{write_examples(Path(sys.argv[1]))} examples in {sys.argv[1]}")
