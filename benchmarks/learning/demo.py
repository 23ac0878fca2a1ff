"""Train the 135M demo with GRPO and with lessons.

    python benchmarks/learning/demo.py FOLDER --tune              # GRPO's updates per batch and learning rate
    python benchmarks/learning/demo.py FOLDER --arms grpo,bank

The second is `mel-lite compare --arms` with the settings below. Either continues after a stop with the same command.
The rule is in docs/learning-rounds.md. Writes demo-tuning.json or demo.json in benchmarks/results/learning.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning"
SIDES = ("before", "after")
SHARED: dict[str, Any] = {
    "train.num_iterations": 2, "train.learning_rate": 2e-4, "train.lr_scheduler_type": "constant",
    "train.replay_control": False, "train.grad_norm_every": 0, "train.save_steps": 20, "export.format": None,
    "eval.limit": 40, "eval.k": 4, "eval.temperature": 1.0,
}  # fmt: skip
"""Of all arms. The first two are the best of TRIED for GRPO."""
TRIED = ((1, 2e-4), (2, 2e-4), (4, 1e-4))
"""Updates per batch and learning rates that were tried for GRPO, on held-out training tasks and another seed."""
TUNING_SEED = 100


def _sets(options: dict[str, Any]) -> list[str]:
    return [part for key, value in options.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def _mel_lite(*arguments: str) -> None:
    if code := subprocess.run([sys.executable, "-m", "mel_lite", *arguments]).returncode:
        sys.exit(code)


def tune(folder: Path, budget_tokens: int) -> None:
    """Train GRPO once with each setting of TRIED."""
    report = []
    for updates, rate in TRIED:
        run = folder / f"grpo-{updates}-{rate:g}-{TUNING_SEED}"
        options = SHARED | {
            "train.num_iterations": updates, "train.learning_rate": rate, "train.algorithm": "grpo",
            "train.seed": TUNING_SEED, "train.max_steps": 1000, "train.max_generated_tokens": budget_tokens,
            "data.eval": "held-out",
        }  # fmt: skip
        _mel_lite("train", "--gpu", "cpu", "--auto-resume", "--output-dir", str(run), *_sets(options))
        report.append({"num_iterations": updates, "learning_rate": rate, "seed": TUNING_SEED} | tuned(run))
    (RESULTS / "demo-tuning.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def tuned(run: Path) -> dict[str, Any]:
    """Return a run's accuracy before and after, its tokens, and per batch of rollouts its reward and entropy."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    batches = [row for row in rows if "reward" in row]
    clipped = [row["clip_ratio/region_mean"] for row in rows if "clip_ratio/region_mean" in row]
    return {
        "generated_tokens": sum(row["mel/generated_tokens"] for row in batches),
        "reward": [round(row["reward"], 4) for row in batches],
        "entropy": [round(row["entropy"], 4) for row in batches],
        "clipped": round(sum(clipped) / len(clipped), 5),
        **{side: json.loads((run / "eval" / f"{side}.json").read_text())["avg_at_k"] for side in SIDES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arms", default="grpo,bank,mel")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget-tokens", type=int, default=12_000)
    parser.add_argument("--tune", action="store_true", help="try settings for GRPO")
    given = parser.parse_args()
    if given.tune:
        return tune(given.folder, given.budget_tokens)
    _mel_lite(
        "compare", "--gpu", "cpu", "--arms", given.arms, "--seeds", str(given.seeds), "--budget-tokens",
        str(given.budget_tokens), "--output", str(given.folder), *_sets(SHARED),
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
    (RESULTS / "demo.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
