"""Does it learn? The demo model after GRPO and after MEL at equal generated tokens, several seeds, learning curves.

`python benchmarks/learning.py --arms grpo mel --seeds 3 --tokens 20000` trains from the packaged warm start and
measures on held-out tasks after every `--every` generated tokens (rollouts, analyses and replays all count). Each run
is one JSON file in benchmarks/results/learning/; runs that are there are not repeated. `--plot` draws docs/learning.png
from them (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import learning_figures
import torch
from transformers import PrinterCallback, TrainerCallback

from mel_lite import MELConfig, MELTrainer
from mel_lite.adapters import attach_adapter, find_adapter
from mel_lite.data import load_tasks
from mel_lite.evaluate import evaluate
from mel_lite.models import ModelSpec, load_base, load_tokenizer

RESULTS = learning_figures.RUNS
PAGE = Path(__file__).resolve().parent.parent / "docs" / "learning.png"
COMMON: dict[str, Any] = {
    "verifier": "numeric", "num_generations": 8, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2,
    "max_completion_length": 64, "analysis_max_tokens": 160, "analysis_temperature": 0.7, "temperature": 1.0,
    "learning_rate": 3e-4, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo"},
    "mel": {"algorithm": "mel"},
    "mel-uplift": {"algorithm": "mel", "replay_criterion": "uplift", "replay_attempts": 2},
    "mel-quarter": {"algorithm": "mel", "mel_weight": 0.25},
    "mel-prompts": {"algorithm": "mel", "mel_normalization": "prompts"},
    "mel-experience": {"algorithm": "mel", "mel_train_on": "experience"},
    "rft": {"algorithm": "rft"},
    "rft-mel": {"algorithm": "rft", "meta_experience": True},
    "reinforce++": {"algorithm": "reinforce++"},
    "reinforce++-mel": {"algorithm": "reinforce++", "meta_experience": True},
}
LOGGED = (
    "reward", "mel/pass_rate", "mel/groups", "mel/mixed_groups", "mel/parsed", "mel/leak_free", "mel/replay_valid",
    "mel/retention_ratio", "mel/replay_uplift", "mel/nll", "mel/nll_after", "mel/grad_norm_policy", "mel/grad_norm_nll",
    "mel/grad_cosine", "step_time",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What every run has in common."""

    tokens: int
    every: int
    tasks: int
    samples: int
    dtype: str


class Curve(TrainerCallback):
    """Measures at every `plan.every` generated tokens, and stops at `plan.tokens`."""

    def __init__(self, plan: Plan, tokenizer: Any, tasks: Any) -> None:
        self.points: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.trainer: Any = None
        self._plan, self._tokenizer, self._tasks = plan, tokenizer, tasks
        self._train_tokens = 0

    def measure(self) -> None:
        """Add a point; its own tokens do not count."""
        engine = self.trainer.engine
        before = engine.total_generated_tokens
        result = evaluate(
            engine, self._tokenizer, self._tasks, self.trainer.judge, k=self._plan.samples, max_new_tokens=64, seed=1234
        )
        engine.total_generated_tokens = before
        figures = {name: getattr(result, name) for name in ("pass_at_1", "avg_at_k", "pass_at_k")}
        intervals = {name: [i.value, i.low, i.high] for name, i in figures.items()}
        answers = {"greedy_right": [int(s.greedy_right) for s in result.scores]}
        answers["samples_right"] = [s.samples_right for s in result.scores]
        self.points.append({"tokens": before, "step": self.trainer.state.global_step, **intervals, **answers})
        print(
            f"  {before:6d} tokens, step {self.points[-1]['step']:3d}: avg@{self._plan.samples} {intervals['avg_at_k']}"
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            kept = {name: logs[name] for name in LOGGED if logs.get(name) is not None}
            self.steps.append({"step": state.global_step, "tokens": self.trainer.engine.total_generated_tokens} | kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tokens = self.trainer.engine.total_generated_tokens
        done = tokens >= self._plan.tokens
        if done or tokens - self.points[-1]["tokens"] >= self._plan.every:
            self.measure()
        control.should_training_stop = done


def run(arm: str, seed: int, plan: Plan, start: dict[str, Any] | None) -> dict[str, Any]:
    """One run from the warm start, whose own point is `start` if it is known already, to the token budget."""
    spec = ModelSpec("demo", dtype=plan.dtype)
    tokenizer = load_tokenizer(spec)
    model = attach_adapter(load_base(spec), find_adapter("demo"), trainable=True)
    curve = Curve(plan, tokenizer, load_tasks("demo:test", limit=plan.tasks, conversational=True))
    options = COMMON | ARMS[arm] | {"grad_norm_every": 4 if "mel" in arm else 0, "replay_control": "mel" in arm}
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        args = MELConfig(folder, max_steps=10_000, seed=seed, use_cpu=not torch.cuda.is_available(), **options)
        curve.trainer = MELTrainer(
            model=model, args=args, train_dataset=load_tasks("demo", conversational=True), processing_class=tokenizer,
            callbacks=[curve],
        )  # fmt: skip
        curve.trainer.remove_callback(PrinterCallback)
        if start is None:
            curve.measure()
        else:
            curve.points.append(start)
        curve.trainer.train()
    took_s = round(time.monotonic() - started_s)
    return {
        "arm": arm,
        "seed": seed,
        "options": options,
        "took_s": took_s,
        "points": curve.points,
        "steps": curve.steps,
    }


def plot(target: Path) -> None:
    """Learning curves, what each arm gained over GRPO, and what became of the lessons, over generated tokens."""
    from matplotlib import pyplot

    runs = learning_figures.runs()
    samples = next(iter(runs.values()))[0]["plan"]["samples"]
    figure, (curves, lessons, terms) = pyplot.subplots(1, 3, figsize=(15, 4.2))
    for color, (arm, group) in enumerate(runs.items()):
        for each in group:
            points = each["points"]
            curves.plot(
                [p["tokens"] for p in points], [p["avg_at_k"][0] for p in points], color=f"C{color}", alpha=0.25
            )
        means = [
            [sum(p[key] for p in points) / len(points) for key in ("tokens", "share")] for points in _by_rank(group)
        ]
        curves.plot(*zip(*means, strict=True), color=f"C{color}", marker="o", label=f"{arm} ({len(group)} seeds)")
    for axis, panels in (
        (lessons, {"mel/retention_ratio": "retention", "mel/replay_uplift": "uplift"}),
        (terms, {"mel/grad_norm_policy": "policy gradient norm", "mel/grad_norm_nll": "NLL gradient norm",
                 "mel/grad_cosine": "their cosine"}),
    ):  # fmt: skip
        for color, (name, label) in enumerate(panels.items()):
            steps = [step for run in runs.get("mel", []) for step in run["steps"] if name in step]
            axis.scatter([s["tokens"] for s in steps], [s[name] for s in steps], color=f"C{color}", s=14, label=label)
        axis.axhline(0, color="grey", linewidth=0.5)
    curves.set(title=f"Avg@{samples} on held-out tasks (faint: one seed)", ylabel="share right")
    lessons.set(title="lessons of arm mel, all seeds, per step")
    terms.set(title="gradients of arm mel, all seeds")
    for axis in (curves, lessons, terms):
        axis.set_xlabel("generated tokens")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def _by_rank(group: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    """Points of the runs of one arm, first measurements together, then second ones, and so on."""
    lined_up = zip(*(run["points"] for run in group), strict=False)
    return [[{"tokens": p["tokens"], "share": p["avg_at_k"][0]} for p in points] for points in lined_up]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["grpo", "mel"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plot", action="store_true", help="draw what is there, train nothing")
    options = parser.parse_args()
    if options.plot:
        plot(PAGE)
        return
    plan = Plan(options.tokens, options.every, options.tasks, options.samples, options.dtype)
    RESULTS.mkdir(parents=True, exist_ok=True)
    start = None
    for seed in range(options.seeds):
        for arm in options.arms:
            file = RESULTS / f"{arm}-{seed}.json"
            if file.exists():
                continue
            print(f"{arm}, seed {seed}")
            found = run(arm, seed, plan, start) | {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "plan": asdict(plan),
            }
            start = found["points"][0]
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
