"""Does a lesson teach? GRPO, MEL and its rivals through MELTrainer, from one start, at equal generated tokens.

    python benchmarks/learning/study.py --regime starved --arms grpo bank-frozen --seeds 0 1 2 3 4 5 6 7
    python benchmarks/learning/study.py --regime starved --arms grpo --seeds 100 --split tune --set num_iterations=3

Rollouts, analyses and replays count as generated tokens; measurements do not. Each run is one JSON file in
benchmarks/results/learning/REGIME/ (settings that were tried: REGIME/tune/); a run whose file exists is not repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import learning_subject
import torch
import yaml
from learning_arms import ARMS, CHOSEN, KEPT_FROM
from transformers import PrinterCallback, TrainerCallback

from mel_lite import MELConfig, MELTrainer
from mel_lite.engines.hf import HFEngine
from mel_lite.evaluate import evaluate
from mel_lite.lessons.bank import BankLesson, LessonBank
from mel_lite.models.load import ModelSpec, eos_ids, load_base, load_tokenizer

RESULTS = Path(__file__).resolve().parents[1] / "results" / "learning"
COMMON: dict[str, Any] = {
    "verifier": "learning_subject:strict", "num_generations": 8, "per_device_train_batch_size": 64, "temperature": 1.0,
    "lr_scheduler_type": "constant", "weight_decay": 0.0, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "probe_max_diff": None,
    "max_idle_steps": 0, "analysis_max_tokens": 64, "bank_settled_nats": None, "learning_rate": 3e-4,
    "max_steps": 100_000,
}  # fmt: skip
REGIMES: dict[str, dict[str, Any]] = {
    "plenty": {"tokens": 40_000, "max_completion_length": 48},
    "starved": {"tokens": 60_000, "max_completion_length": 80},
}
LOGGED = (
    "reward", "completions/mean_length", "frac_reward_zero_std", "grad_norm", "entropy", "clip_ratio/region_mean",
    "mel/mixed_groups", "mel/written", "mel/parsed",
    "mel/leak_free", "mel/replay_valid", "mel/quoted", "mel/score_shift", "mel/teacher_shift", "mel/taught_rows",
    "mel/taught_tokens", "mel/without_notes", "mel/nll", "mel/nll_after", "mel/bank_active", "mel/bank_retired",
)  # fmt: skip
LINES = ("points", "steps", "lessons")
"""Lists in the file of a run, one line per entry."""
TUNING_SEEDS = (100, 101, 102)
SEEDS_OF_MEASURING = 1234
"""Every measurement uses it, so all runs answer the held-out tasks on the same random numbers."""


class Curve(TrainerCallback):
    """Measures at equal distances in generated tokens, and stops at the budget."""

    def __init__(self, options: argparse.Namespace, budget_tokens: int, max_new_tokens: int) -> None:
        self.points: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.trainer: Any = None
        self._options, self._budget, self._max_new_tokens = options, budget_tokens, max_new_tokens
        self._started_s = time.monotonic()
        self._measured_s = 0.0

    @property
    def tokens(self) -> int:
        """Generated for training: measurements use the engine beneath the meter."""
        return int(self.trainer.engine.total_generated_tokens)

    def measure(self, *, last: bool = False) -> None:
        """Add a point."""
        options, began_s = self._options, time.monotonic()
        point: dict[str, Any] = {
            "tokens": self.tokens, "step": self.trainer.state.global_step,
            "took_s": round(began_s - self._started_s - self._measured_s, 1),
        }  # fmt: skip
        for split in (options.split, "longer") if last else (options.split,):
            found = self._evaluate(learning_subject.tasks(options.regime, split), options.tasks)
            point[split] = {
                "greedy_right": [int(score.greedy_right) for score in found.scores],
                "samples_right": [score.samples_right for score in found.scores],
            }
            print(f"  {point['tokens']:6d} tokens, {split}: {found.pass_at_1.value:.3f} {found.avg_at_k.value:.3f} "
                  f"{found.pass_at_k.value:.3f} {point['took_s']} s", flush=True)  # fmt: skip
        self.points.append(point)
        self._measured_s += time.monotonic() - began_s

    def _evaluate(self, tasks: Any, count: int) -> Any:
        trainer = self.trainer
        return evaluate(
            trainer.engine.unmetered, trainer.processing_class, tasks.select(range(min(count, len(tasks)))),
            trainer.judge, k=self._options.samples, temperature=1.0, max_new_tokens=self._max_new_tokens,
            seed=SEEDS_OF_MEASURING,
        )  # fmt: skip

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            kept = {name: float(f"{float(logs[name]):.4g}") for name in LOGGED if logs.get(name) is not None}
            self.steps.append({"step": state.global_step, "tokens": self.tokens} | kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.num_iterations:
            return  # the rest of the batch's updates cost no token
        done = self.tokens >= self._budget
        if done or self.tokens >= len(self.points) * self._budget / self._options.points:
            self.measure(last=done)
        control.should_training_stop = done


def run(arm: str, seed: int, options: argparse.Namespace, changes: dict[str, Any]) -> dict[str, Any]:
    """Train one arm from the start model to the token budget."""
    regime = dict(REGIMES[options.regime])
    budget_tokens = options.tokens or regime.pop("tokens")
    regime.pop("tokens", None)
    chosen = CHOSEN[options.regime]
    settings = (
        COMMON | regime | ARMS[arm] | (chosen.get(arm, chosen["grpo"]) if options.split == "test" else {}) | changes
    )
    curve = Curve(options, budget_tokens, settings["max_completion_length"])
    spec = ModelSpec(str(options.model), dtype="float32")
    model, tokenizer = load_base(spec), load_tokenizer(spec)
    model.get_output_embeddings().requires_grad_(False)  # like under LoRA; the divergence needs it
    with tempfile.TemporaryDirectory() as folder:
        args = MELConfig(folder, seed=seed, use_cpu=True, templates=str(options.model / "templates.yaml"), **settings)
        engine = HFEngine(
            model, eos_ids=eos_ids(model, tokenizer), pad_id=tokenizer.pad_token_id, max_cache_tokens=2_000_000
        )
        curve.trainer = MELTrainer(
            model=model, args=args, train_dataset=learning_subject.tasks(options.regime, "train"),
            processing_class=tokenizer, callbacks=[curve], engine=engine,
        )  # fmt: skip
        curve.trainer.remove_callback(PrinterCallback)
        if arm.startswith("bank-kept"):
            curve.trainer.bank.adopt(kept_lessons(options.regime, seed))
        curve.measure()
        curve.trainer.train()
        bank = curve.trainer.bank
    return {
        "arm": arm, "seed": seed, "regime": options.regime, "split": options.split, "tokens": budget_tokens,
        "settings": settings, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "bank": None if bank is None else rules_of(bank),
        "lessons": [] if bank is None else [asdict(lesson) for lesson in bank.lessons],
        "points": curve.points, "steps": curve.steps,
    }  # fmt: skip


def kept_lessons(regime: str, seed: int) -> list[BankLesson]:
    """Return the lessons at the end of an earlier run, which was made to tune `KEPT_FROM` and took its chosen settings.

    Its seed is `TUNING_SEEDS[seed % 3]`. Raises: FileNotFoundError when no such run was made.
    """
    source, chosen = TUNING_SEEDS[seed % len(TUNING_SEEDS)], CHOSEN[regime][KEPT_FROM]
    for file in sorted((RESULTS / regime / "tune").glob(f"{KEPT_FROM}*-{source}.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        if all(found["settings"][name] == value for name, value in chosen.items()):
            return [BankLesson(**lesson) for lesson in found["lessons"]]
    raise FileNotFoundError(f"{RESULTS / regime / 'tune'}: no run of {KEPT_FROM} with seed {source} and {chosen}")


def rules_of(bank: LessonBank) -> dict[str, int]:
    """Return how many rules the bank teaches at the end of a run, and how many of them are true."""
    taught = [each for each in bank.lessons if each.score >= bank.options.teach_from]
    rules = {rule for lesson in taught for rule in learning_subject.rules_in(lesson.heuristic)}
    truth = learning_subject.truth()
    return {"rules": len(rules), "true": sum(truth.get(operator) == reading for operator, reading in rules)}


def save(found: dict[str, Any], file: Path) -> None:
    """Write one line per point, step and lesson, so that a run and a change of it are readable."""
    head = json.dumps({name: value for name, value in found.items() if name not in LINES})
    rows = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in found[name]) + "\n]"
        for name in LINES
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head[:-1] + ",\n" + ",\n".join(rows) + "}\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=learning_subject.MODEL, help="folder of the start model")
    parser.add_argument("--regime", choices=list(REGIMES), default="starved")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["grpo", "mel"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=("tune", "test"), default="test")
    parser.add_argument("--folder", default=".", help="of the results within the regime's, such as `second`")
    parser.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="options of MELConfig, as in YAML")
    parser.add_argument("--tokens", type=int, help="generated per run")
    parser.add_argument("--points", type=int, default=3, help="measurements per run, besides the start")
    parser.add_argument("--tasks", type=int, default=150)
    parser.add_argument("--samples", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    options = _options()
    changes = {name: yaml.safe_load(value) for name, value in (each.split("=", 1) for each in options.set)}
    label = "".join(f",{each}" for each in options.set)
    home = RESULTS / options.regime / ("tune" if options.split == "tune" else options.folder)
    for seed in options.seeds:
        for arm in options.arms:
            file = home / f"{arm}{label}-{seed}.json"
            if not file.exists():
                print(f"{options.regime} {arm} seed {seed} {label}", flush=True)
                save(run(arm, seed, options, changes), file)


if __name__ == "__main__":
    main()
