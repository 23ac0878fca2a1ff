"""Train the 135M demo with GRPO and with lessons: `python benchmarks/learning/demo.py FOLDER --arms grpo,bank`.

It is `mel-lite compare --arms` with the settings below, and the same command continues after a stop. The rule is in
docs/learning.md. Writes benchmarks/results/learning/demo.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SIDES = ("before", "after")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning" / "demo.json"
SHARED: dict[str, Any] = {
    "train.num_iterations": 2, "train.learning_rate": 2e-4, "train.lr_scheduler_type": "constant",
    "train.replay_control": False, "train.grad_norm_every": 0, "train.save_steps": 20, "export.format": None,
    "eval.limit": 40, "eval.k": 4, "eval.temperature": 1.0,
}  # fmt: skip
"""Of all arms. The first two were chosen for GRPO on held-out training tasks, seed 100."""


def _sets(options: dict[str, Any]) -> list[str]:
    return [part for key, value in options.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", default="grpo,bank,mel")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget-tokens", type=int, default=12_000)
    given = parser.parse_args()
    command = [
        "compare", "--gpu", "cpu", "--arms", given.arms, "--seeds", str(given.seeds), "--budget-tokens",
        str(given.budget_tokens), "--output", str(given.folder), *_sets(SHARED),
    ]  # fmt: skip
    if code := subprocess.run([sys.executable, "-m", "mel_lite", *command]).returncode:
        sys.exit(code)
    save(given.folder, given.budget_tokens)


def save(folder: Path, budget_tokens: int) -> None:
    """Write the comparison with each run's own figures, without machine paths."""
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    runs = {}
    for arm in found["arms"]:
        arm["folders"] = [Path(each).name for each in arm["folders"]]
        for name in arm["folders"]:
            both = {when: json.loads((folder / name / "eval" / f"{when}.json").read_text()) for when in SIDES}
            runs[name] = {when: each["avg_at_k"]["value"] for when, each in both.items()}
    report = {"budget_tokens": budget_tokens, "settings": SHARED, "runs": runs, **found}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
