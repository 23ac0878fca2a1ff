"""`python -m demo_warmup FILE.jsonl` writes the examples of the shipped recipe."""

from __future__ import annotations

import sys
from pathlib import Path

from demo_warmup.examples import write_examples

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m demo_warmup FILE.jsonl")
    print(f"{write_examples(Path(sys.argv[1]))} examples in {sys.argv[1]}")
