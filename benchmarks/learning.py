"""Does it learn? One model after GRPO, after MEL, and after MEL with one thing changed, at equal generated tokens.

`python benchmarks/learning.py --arms grpo mel --seeds 5` makes the small model once (`learning_small.py`, minutes on
one core), trains from it, and measures on held-out tasks four times per run; rollouts, analyses and replays all count
as generated tokens, the measurements do not. Each run is one JSON file in benchmarks/results/learning/; runs that are
there are not repeated. `--model demo` runs the same with the 135M demo model and its adapter (for a GPU);
`--scan 1e-4 3e-4` tries learning rates with a seed of its own. `python benchmarks/learning_plot.py` draws the figure.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

import learning_figures
import learning_small
from demo_warmup.examples import make_examples
from demo_warmup.measure import Conditions, measure_engine
from learning_arms import ARMS
from mel_lite import MELConfig, MELTrainer
from mel_lite.data.tasks import load_tasks
from mel_lite.engines.base import Engine
from mel_lite.engines.hf import HFEngine
from mel_lite.evaluate import evaluate
from mel_lite.lessons.prompts import load_templates
from mel_lite.models.adapters import attach_adapter, find_adapter
from mel_lite.models.demo import cache_dir
from mel_lite.models.load import ModelSpec, eos_ids, load_base, load_tokenizer

RESULTS = learning_figures.RUNS
SCAN_SEED = 100
"""Far from the study's seeds 0, 1, 2 ...: the learning rate is not chosen on the runs that are reported."""
COMMON: dict[str, Any] = {
    "verifier": "numeric", "num_generations": 8, "temperature": 1.0, "lr_scheduler_type": "constant",
    "logging_steps": 1, "save_strategy": "no", "report_to": "none", "bf16": False, "gradient_checkpointing": False,
    "disable_tqdm": True, "grad_norm_every": 5, "probe_max_diff": None, "max_idle_steps": 0, "on_collapse": "warn",
}  # fmt: skip
LOGGED = (
    "reward", "grad_norm", "mel/groups", "mel/mixed_groups", "mel/written", "mel/parsed", "mel/leak_free",
    "mel/replay_valid", "mel/replay_solved", "mel/nll", "mel/nll_after", "mel/grad_norm_policy", "mel/grad_norm_nll",
    "mel/grad_cosine",
)  # fmt: skip
FUNNEL = ("pass_rate", "analyses", "parsed", "retention_k1", "solved_with_lesson", "solved_without", "uplift")
SEEDS_OF_MEASURING = 1234
"""The seed of every measurement: all runs answer the held-out tasks on the same random numbers."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every run has in common."""

    model: str
    tokens: int
    points: int
    tasks: int
    samples: int
    lessons: int
    """Held-out tasks on which lessons are written and replayed at each measurement, without training on them."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is trained, on what, and how: `load` gives fresh weights every time."""

    tokenizer: Any
    load: Callable[[], Any]
    train: Any
    test: Any
    made: list[dict[str, Any]]
    """Pairs with a known slip and their analyses, to see whether the model points at it."""
    options: dict[str, Any]
    engine: Engine | None = None
    """What samples; None = transformers, from the model being trained."""


def small(folder: Path | None = None) -> Subject:
    """The small model, made if it is not in `folder` (the cache) yet. All of its weights are trained."""
    folder = folder or cache_dir() / "learning-small"
    if not (folder / "recipe.json").exists():
        learning_small.make(folder)
    spec = ModelSpec(str(folder), dtype="float32")
    made = make_examples({"analyse": 48}, seed=77, templates=learning_small.templates())
    return Subject(
        load_tokenizer(spec), partial(load_base, spec), learning_small.tasks("train"), learning_small.tasks("test"),
        [learning_small.shorter(each) for each in made],
        {"templates": str(folder / "templates.yaml"), "per_device_train_batch_size": 32, "max_completion_length": 48,
         "analysis_max_tokens": 120, "analysis_temperature": 1.0, "learning_rate": 5e-5},
    )  # fmt: skip


def demo() -> Subject:
    """The demo model from its packaged warm start; its LoRA adapter is trained."""
    spec = ModelSpec("demo", dtype="float32")
    return Subject(
        load_tokenizer(spec), lambda: attach_adapter(load_base(spec), find_adapter("demo"), trainable=True),
        load_tasks("demo", conversational=True), load_tasks("demo:test", conversational=True),
        make_examples({"analyse": 48}, seed=77),
        {"per_device_train_batch_size": 32, "max_completion_length": 64, "analysis_max_tokens": 160,
         "analysis_temperature": 0.7, "learning_rate": 1e-4},
    )  # fmt: skip


class Curve(TrainerCallback):
    """Measures `plan.points` times per run at equal distances in generated tokens, and stops at `plan.tokens`."""

    def __init__(self, plan: Plan, subject: Subject) -> None:
        self.points: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.trainer: Any = None
        self._plan, self._subject = plan, subject

    @property
    def tokens(self) -> int:
        """Generated for training: measurements use the engine beneath the meter."""
        return int(self.trainer.engine.total_generated_tokens)

    def measure(self) -> None:
        """Add a point."""
        plan, subject = self._plan, self._subject
        engine, options = self.trainer.engine.unmetered, self.trainer.args
        test = subject.test.select(range(plan.tasks))
        result = evaluate(
            engine, subject.tokenizer, test, self.trainer.judge, k=plan.samples,
            max_new_tokens=options.max_completion_length, seed=SEEDS_OF_MEASURING,
        )  # fmt: skip
        conditions = Conditions(
            prompts=plan.lessons, attempts=2, max_completion_tokens=options.max_completion_length,
            analysis_max_tokens=options.analysis_max_tokens, analysis_temperature=options.analysis_temperature,
            seed=SEEDS_OF_MEASURING,
        )  # fmt: skip
        found, _ = measure_engine(
            engine, subject.tokenizer, test.select(range(plan.lessons)), subject.made, conditions,
            load_templates(options.templates),
        )  # fmt: skip
        answers = {"greedy_right": [int(s.greedy_right) for s in result.scores]}
        answers["samples_right"] = [s.samples_right for s in result.scores]
        lessons = {name: found[name] for name in (*FUNNEL, "points_right")}
        self.points.append(
            {"tokens": self.tokens, "step": self.trainer.state.global_step, **answers, "lessons": lessons}
        )
        print(
            f"  {self.tokens:6d} tokens, step {self.points[-1]['step']:3d}: greedy {result.pass_at_1}, "
            f"avg {result.avg_at_k}, pass {result.pass_at_k}; {lessons}",
            flush=True,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            kept = {name: _short(logs[name]) for name in LOGGED if logs.get(name) is not None}
            self.steps.append({"step": state.global_step, "tokens": self.tokens} | kept)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = self.tokens >= self._plan.tokens
        if done or self.tokens >= len(self.points) * self._plan.tokens / self._plan.points:
            self.measure()
        control.should_training_stop = done


def _short(value: Any) -> float:
    """Four figures are enough in a file that is kept."""
    return float(f"{float(value):.4g}")


def run(arm: str, seed: int, plan: Plan, subject: Subject, start: Any = None, **overrides: Any) -> dict[str, Any]:
    """One run from the start, whose own point is `start` if it is known already, to the token budget."""
    curve = Curve(plan, subject)
    options = COMMON | subject.options | ARMS[arm] | overrides
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        args = MELConfig(folder, max_steps=100_000, seed=seed, use_cpu=not torch.cuda.is_available(), **options)
        model, tokenizer = subject.load(), subject.tokenizer
        engine = subject.engine or HFEngine(
            model, eos_ids=eos_ids(model, tokenizer), pad_id=tokenizer.pad_token_id, max_concurrent=512
        )
        curve.trainer = MELTrainer(
            model=model, args=args, train_dataset=subject.train, processing_class=tokenizer,
            callbacks=[curve], engine=engine,
        )  # fmt: skip
        curve.trainer.remove_callback(PrinterCallback)
        if start is None:
            curve.measure()
        else:
            curve.points.append(start)
        curve.trainer.train()
    options.pop("templates", None)
    took_s = round(time.monotonic() - started_s)
    found = {"arm": arm, "seed": seed, "plan": asdict(plan), "options": options, "took_s": took_s}
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return found | versions | {"points": curve.points, "steps": curve.steps}


def save(found: dict[str, Any], file: Path) -> None:
    """One line per point and per step, so that a run is readable and a change of it is, too."""
    head = json.dumps({name: value for name, value in found.items() if name not in ("points", "steps")})
    rows = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in found[name]) + "\n]"
        for name in ("points", "steps")
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head[:-1] + ",\n" + ",\n".join(rows) + "}\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("small", "demo"), default="small")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["grpo", "mel"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=90_000, help="generated per run")
    parser.add_argument("--points", type=int, default=3, help="measurements per run, beside the start")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--lessons", type=int, default=32)
    parser.add_argument("--scan", nargs="+", type=float, default=[], metavar="RATE", help="learning rates to try")
    return parser.parse_args()


def main() -> None:
    options = _options()
    subject = small() if options.model == "small" else demo()
    tasks = min(options.tasks, len(subject.test))
    plan = Plan(options.model, options.tokens, options.points, tasks, options.samples, options.lessons)
    home = RESULTS if options.model == "small" else RESULTS.with_name(f"learning-{options.model}")
    jobs: list[tuple[Path, str, int, dict[str, float]]] = [
        (home / f"{arm}-{seed}.json", arm, seed, {}) for seed in range(options.seeds) for arm in options.arms
    ]
    if options.scan:
        jobs = [
            (home / "scan" / f"{arm}-{rate:g}.json", arm, SCAN_SEED, {"learning_rate": rate})
            for rate in options.scan
            for arm in options.arms
        ]
    start = None
    for file, arm, seed, overrides in jobs:
        if file.exists():
            start = start or json.loads(file.read_text(encoding="utf-8"))["points"][0]
            continue
        print(f"{arm}, seed {seed} {overrides or ''}", flush=True)
        found = run(arm, seed, plan, subject, start, **overrides)
        start = found["points"][0]
        save(found, file)


if __name__ == "__main__":
    main()
