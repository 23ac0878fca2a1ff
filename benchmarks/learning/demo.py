"""Train the 135M demo with GRPO, a bank of lessons, kept lessons, and the paper's MEL.

    python benchmarks/learning/demo.py FOLDER --kept RUN

It is `mel-lite compare --arms` with the settings below, and the same command continues after a stop. RUN is an earlier
run of the bank, from whose lessons `bank-kept` starts; `--kept` unset makes it first, with seed 100. The rule is in
docs/learning.md. Writes benchmarks/results/learning/demo.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mel_lite.recipe import packaged_options

RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning" / "demo.json"
SHARED: dict[str, Any] = {
    "train.num_iterations": 1, "train.learning_rate": 2e-4, "train.lr_scheduler_type": "constant",
    "train.replay_control": False, "train.grad_norm_every": 0, "train.save_steps": 20, "export.format": None,
    "eval.limit": 40, "eval.k": 4, "eval.temperature": 1.0,
}  # fmt: skip
"""Of all arms. The first two were the best for GRPO on held-out training tasks, seed 100."""
KEPT_SEED = 100


def _sets(options: dict[str, Any]) -> list[str]:
    return [part for key, value in options.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def _run(*arguments: str) -> None:
    if code := subprocess.run([sys.executable, "-m", "mel_lite", *arguments]).returncode:
        sys.exit(code)


def earlier_run(folder: Path, budget_tokens: int) -> Path:
    """Train the bank once, evaluated on held-out training tasks, so that `bank-kept` has lessons to start with."""
    run = folder / f"earlier-bank-{KEPT_SEED}"
    options = SHARED | {
        "data.eval": "held-out", "train.seed": KEPT_SEED, "train.max_steps": 1000,
        "train.max_generated_tokens": budget_tokens,
    }  # fmt: skip
    _run("train", "--gpu", "cpu", "--config", "bank", "--auto-resume", "--output-dir", str(run), *_sets(options))
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", default="grpo,bank,bank-kept,mel")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget-tokens", type=int, default=12_000)
    parser.add_argument("--kept", type=Path, help="earlier run of the bank")
    given = parser.parse_args()
    kept = given.kept or earlier_run(given.folder, given.budget_tokens)
    own = packaged_options("bank") | {"train.lessons_from": str(kept.resolve())}
    _run(
        "compare", "--gpu", "cpu", "--arms", given.arms, "--seeds", str(given.seeds), "--budget-tokens",
        str(given.budget_tokens), "--output", str(given.folder), *_sets(SHARED),
        *(part for key, value in own.items() for part in ("--arm", f"bank-kept:{key}={json.dumps(value)}")),
    )  # fmt: skip
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


SIDES = ("before", "after")


if __name__ == "__main__":
    main()
