"""Run TRL's own tests of GRPOTrainer on TRL's class and on MELTrainer, and print the counts of both.

`PYTHONPATH=benchmarks python -m peer_suite SOURCE`, with SOURCE a checkout of TRL. The tests run on the installed TRL,
without a network: random models and a few texts stand in for the Hub's. Tests of images, vLLM and GPUs are left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from peer_suite.suite import CLASSES, conditions, copy_tests, run_suite, summary

TEXT_ONLY = "not VLM and not vllm and not Slow"


def main() -> None:
    import trl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", type=Path, nargs="?", default=Path(trl.__file__).parents[1],
        help="checkout of TRL (default: the installed one, which has its tests if it is an editable install)",
    )  # fmt: skip
    parser.add_argument("-k", default=TEXT_ONLY, help=f"pytest's choice of tests (default: {TEXT_ONLY!r})")
    parser.add_argument("--out", type=Path, help="write every outcome to this JSON file")
    parser.add_argument("--logs", type=Path, help="keep pytest's output in this folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        copy_tests(arguments.source, folder)
        logs = arguments.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        found = {name: run_suite(name, folder, logs, ["-k", arguments.k]) for name in CLASSES}
    print(summary(found))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"conditions": conditions(arguments.source, arguments.k), "outcomes": found}
        arguments.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
