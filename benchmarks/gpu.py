"""What a GPU says: a MEL step at full size under the memory of consumer cards, beside the prediction; and the engines.

`python benchmarks/gpu.py OUT` measures, in under nine minutes, and writes OUT/gpu.json, one log per part, and a table:

    step-24gb    Qwen3-8B in 4 bits under the memory of a 24 GB card: peak and seconds of every phase at full length
    step-16gb    the same for Qwen3-4B on 16 GB, and
    step-12gb    for Qwen3-1.7B on 12 GB
    engines      what `gpu_engines.py` measures: Unsloth with bitsandbytes, and vLLM with shared weights

Weights are random, of the sizes of the real models; nothing is downloaded. Each part runs in a process of its own: one
that fails is written down and the others run. `--parts` chooses, `--minutes` bounds the whole. Where bitsandbytes is
missing, weights stay in 16 bits, as the figures then say. Beside the steps the engines have two minutes, and what they
finished by then is kept; `--parts engines` gives them all. `--dry-run` goes through it on a CPU with tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

STEPS = {"step-24gb": "24gb", "step-16gb": "16gb", "step-12gb": "12gb"}
WEIGHTS = {"step-24gb": 9, "step-16gb": 4, "step-12gb": 3, "engines": 4}
"""Shares of the time. The largest model gets enough to sample at full length."""
PARTS = tuple(WEIGHTS)
QUICK_S = 240.0
"""With less time than this, the engines take their short form."""
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "unsloth", "unsloth_zoo", "vllm", "triton")
GIB = 2**30
PROBE_TOKENS = 24
"""Sampled first, to know how many of the longest fit into the time."""
TINY_STEP: dict[str, Any] = {
    "train.max_completion_length": 24, "train.analysis_max_tokens": 16, "train.max_context_tokens": 300,
    "data.max_prompt_tokens": 40, "train.max_micro_batch_tokens": 400, "train.max_cache_tokens": 500, "lora.r": 4,
    "train.optim": "adamw_torch", "train.use_cpu": True, "train.bf16": False, "train.fp16": False,
    "model.dtype": "float32", "train.gradient_checkpointing": True,
}  # fmt: skip


class Finished(Exception):
    """Ends `train` before its first step: everything is measured."""


# ---- the parent: parts in order, each in a process of its own -------------------------------------------------------


def measure_all(out: Path, parts: list[str], minutes: float, dry_run: bool) -> dict[str, Any]:
    """Run the parts within the time; every part's figures, or why there are none."""
    end_s = time.monotonic() + 60 * minutes
    found: dict[str, Any] = {"machine": machine(), "dry_run": dry_run, "parts": {}}
    for i, part in enumerate(parts):
        # What parts before this one saved is shared, too.
        seconds = (end_s - time.monotonic()) * WEIGHTS[part] / sum(WEIGHTS[name] for name in parts[i:])
        found["parts"][part] = run_part(out, part, seconds, dry_run)
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def run_part(out: Path, part: str, seconds: float, dry_run: bool) -> dict[str, Any]:
    if seconds < 20:
        return {"error": "not run: the time was used up"}
    result, log = out / f"{part}.json", out / f"{part}.log"
    for old in (result, out / "gpu-engines.json"):
        old.unlink(missing_ok=True)
    command = [sys.executable, __file__, str(out), "--part", part, "--seconds", f"{seconds - 10:.0f}"]
    start_s = time.monotonic()
    with log.open("w") as file:
        # A session of its own, so that what it starts ends with it.
        process = subprocess.Popen(
            command + ["--dry-run"] * dry_run, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = 124
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    partial = out / "gpu-engines.json"  # which grows while the engines are measured
    for file in (result, partial) if part == "engines" else (result,):
        if file.is_file():
            found = json.loads(file.read_text())
            break
    else:
        found = {}
    if code:
        ending = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        found.setdefault("error", f"exit code {code}: {ending}")
    return found | {"wall_s": round(time.monotonic() - start_s, 1)}


def machine() -> dict[str, Any]:
    """Versions, and the GPU."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    facts: dict[str, Any] = {"python": sys.version.split()[0], "packages": {name: version(name) for name in PACKAGES}}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts |= {"gpu": torch.cuda.get_device_name(), "free_bytes": free, "total_bytes": total}
        facts |= {"cuda": torch.version.cuda, "capability": torch.cuda.get_device_capability()}
    return facts


def table(found: dict[str, Any]) -> str:
    """The figures of all parts, for a terminal."""
    lines = []
    for part, figures in found["parts"].items():
        lines.append(f"{part}: {figures.get('model', '')} {figures.get('wall_s', 0):.0f} s")
        if "error" in figures:
            lines.append(f"    {figures['error'].splitlines()[-1]}")
        for row in figures.get("phases", ()):
            if "error" in row:
                lines.append(f"    {row['name']:<10} {row['error'].splitlines()[0][:100]}")
                continue
            ratio = f"{row['measured_bytes'] / row['predicted_bytes']:.3f}" if row["predicted_bytes"] else "-"
            lines.append(
                f"    {row['name']:<12} predicted {row['predicted_bytes'] / GIB:6.2f}  measured "
                f"{row['measured_bytes'] / GIB:6.2f} GiB  ratio {ratio:>6}  {row['seconds_s']:7.2f} s  "
                f"{row.get('tokens_per_s') or 0:9.0f} tokens/s  share {row.get('share', 0):5.1%}"
                + "  LOWERED: it ran out of memory first"
                * row.get("lowered", False)
            )
        for check, stages in figures.get("checks", {}).items():
            told = (f"{name} {'ok' if stage.get('ok') else 'FAILED'}" for name, stage in stages.items())
            lines.append(f"    {check}: {', '.join(told)}")
    return "\n".join(lines)


# ---- one step at full size -------------------------------------------------------------------------------------------


def step(part: str, out: Path, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Peak and seconds of every phase of one preset's step, under its card's memory."""
    from random_models import config_of, random_weights

    from mel_lite.memory import CONTEXT_BYTES
    from mel_lite.planning import BUDGETS, plan_for

    gpu, end_s = STEPS[part], time.monotonic() + seconds
    name, config = config_of(gpu, dry_run)
    figures: dict[str, Any] = {"model": name, "gpu": gpu, "budget_bytes": BUDGETS[gpu], "phases": []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        random_weights(folder, config)
        overrides: list[tuple[str, Any]] = [("model.name", str(folder)), ("train.max_steps", 1)]
        overrides += list(TINY_STEP.items()) if dry_run else [("train.bf16", True), ("train.fp16", False)]
        try:
            importlib.import_module("bitsandbytes")
        except Exception as error:  # whatever a broken installation raises is the finding
            figures["without_4bit"] = f"{type(error).__name__}: {error}"
            overrides += [("model.load_in_4bit", False), ("train.optim", "adamw_torch")]
        recipe, made_plan, reason = plan_for(gpu, None, overrides)
        assert made_plan is not None, reason
        figures |= {"choices": made_plan.choices, "fits": made_plan.fits, "load_in_4bit": recipe.model.load_in_4bit}
        if not made_plan.fits:
            return figures | {"error": made_plan.refusal()}
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (BUDGETS[gpu] - CONTEXT_BYTES) / total))
        Measurement(recipe, figures, out / f"{part}.json", end_s).run(folder / "run")
    return figures


class Measurement:
    """One process's step: what it measures goes to its file at once, so that a crash leaves what came before."""

    def __init__(self, recipe: Any, figures: dict[str, Any], file: Path, end_s: float) -> None:
        from mel_lite.planning import shape_for
        from mel_lite.workload import workload

        self.recipe, self.figures, self.file, self.end_s = recipe, figures, file, end_s
        self.load = workload(recipe, shape_for(recipe))
        self.trainer: Any = None

    def run(self, folder: Path) -> None:
        """Load, train as far as the first step, and go through the phases there."""
        from datasets import Dataset
        from transformers import TrainerCallback

        from mel_lite import MELTrainer
        from mel_lite.adapters import lora_config
        from mel_lite.models import load_base, load_tokenizer
        from mel_lite.presets import build_args

        loaded: list[Any] = []
        self.phase("load", lambda: loaded.append(load_base(self.recipe.model)))
        args = build_args(self.recipe, folder)
        args.verifier, args.disable_tqdm, args.save_strategy = "numeric", True, "no"
        tasks = Dataset.from_list([{"prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(64)])
        self.trainer = MELTrainer(
            loaded.pop(), args=args, train_dataset=tasks, processing_class=load_tokenizer(self.recipe.model),
            peft_config=lora_config(self.recipe.lora),
        )  # fmt: skip
        measurement = self

        class Begin(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                measurement.phases()
                raise Finished

        self.trainer.add_callback(Begin())
        try:
            self.trainer.train()
        except Finished:
            pass

    def phases(self) -> None:
        """The update first, which is what plans are for; then scoring, the optimiser, and sampling as time allows."""
        from mel_lite.worst_case import worst_step

        trainer, load = self.trainer, self.load
        states = self.predicted("update").parts["optimiser states"]
        for name in ("update", "scoring"):
            self.phase(name, lambda name=name: worst_step(trainer, load, Silent(), states_bytes=states, only=[name]))
        # Most steps measure no gradients: what those take, and how fast they are.
        trainer.args.grad_norm_every = 0
        plain = replace(load, measures_gradients=False)
        self.phase(
            "update-plain",
            lambda: worst_step(trainer, plain, Silent(), states_bytes=states, only=["update"]),
            load=plain,
        )
        self.phase("optimiser", self.optimise)
        names = list(load.sampled)
        for i, name in enumerate(names):
            self.sample(name, (self.end_s - time.monotonic()) / (len(names) - i))
        self.shares()

    def optimise(self) -> None:
        for weight in self.trainer.model.parameters():
            if weight.requires_grad:
                weight.grad = torch.full_like(weight, 1e-4)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    def sample(self, name: str, seconds: float) -> None:
        """One round at full length, or at what length the time allows; the prediction is then for that length."""
        from mel_lite.worst_case import worst_step

        key = "analysis_tokens" if name == "analysis" else "completion_tokens"
        at_once, full = self.load.at_once(name), getattr(self.load, key)

        def cut(tokens: int) -> Any:
            """The same number of sequences, prompts as they were."""
            _, prompt, _ = self.load.sampled[name]
            shorter = replace(self.load, **{key: tokens}, max_cache_tokens=at_once * (prompt + tokens))
            if name == "replay":  # whose prompt has an analysis in it
                assert shorter.sampled[name][1] == prompt
            return shorter

        start_s = time.monotonic()
        try:
            worst_step(self.trainer, cut(min(PROBE_TOKENS, full)), Silent(), only=[name])
        except Exception as error:
            self.note({"name": name, "error": f"{type(error).__name__}: {error}"})
            return
        per_token_s = (time.monotonic() - start_s) / min(PROBE_TOKENS, full)
        tokens = min(full, max(PROBE_TOKENS, int(0.8 * seconds / per_token_s)))
        load = cut(tokens)
        self.phase(
            name, lambda: worst_step(self.trainer, load, Silent(), only=[name]), load=load,
            tokens=at_once * tokens, sequences=at_once, new_tokens=tokens, full_tokens=full,
        )  # fmt: skip

    def predicted(self, name: str, load: Any = None) -> Any:
        from mel_lite.workload import predict

        return next(phase for phase in predict(load or self.load) if phase.name == name)

    def phase(self, name: str, work: Any, *, load: Any = None, tokens: int | None = None, **facts: Any) -> None:
        """Measure one phase; an error is a finding, too."""
        from mel_lite.worst_case import gauge_here

        gauge, expected = gauge_here(), self.predicted(name.removesuffix("-plain"), load)
        if name.startswith("update"):
            tokens = sum(sum(part.lengths) for part in self.load.fullest_parts)
        gauge.start()
        start_s = time.monotonic()
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.note({"name": name, "predicted_bytes": expected.bytes, "error": f"{type(error).__name__}: {error}"})
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            facts |= {"allocated_bytes": torch.cuda.max_memory_allocated(), "device_used_bytes": total - free}
            facts["reserved_bytes"] = torch.cuda.max_memory_reserved()
        seconds_s = time.monotonic() - start_s
        row = {"name": name, "predicted_bytes": expected.bytes, "measured_bytes": gauge.peak_bytes()}
        row |= {"predicted_parts": expected.parts, "seconds_s": seconds_s, **facts}
        if self.trainer is not None:  # both are lowered by what runs out of memory
            at_once = getattr(self.trainer.engine._engine, "_max_concurrent", None)
            row |= {"budget_tokens": self.trainer.budget_tokens, "max_concurrent": at_once}
            row["lowered"] = self.trainer.budget_tokens != self.load.max_micro_batch_tokens
            row["lowered"] |= bool(at_once and facts.get("sequences", 0) > at_once)
        if tokens:
            row |= {"tokens": tokens, "tokens_per_s": tokens / seconds_s}
        self.note(row)

    def note(self, row: dict[str, Any]) -> None:
        self.figures["phases"].append(row)
        self.file.write_text(json.dumps(self.figures, indent=1) + "\n")

    def shares(self) -> None:
        """Share of each phase in a step of full length, from the measured speeds: an estimate, not a measurement."""
        load, whole = self.load, {}
        rows = {row["name"]: row for row in self.figures["phases"] if "tokens_per_s" in row}
        for name, (sequences, _, new_tokens) in load.sampled.items():
            if name in rows:
                rounds = -(-sequences // load.at_once(name))
                whole[name] = rounds * new_tokens * rows[name]["seconds_s"] / rows[name]["new_tokens"]
        if "update-plain" in rows:
            steps = load.completions // load.micro_batch
            whole["update-plain"] = steps * load.micro_batch_tokens / rows["update-plain"]["tokens_per_s"]
        for name, seconds_s in whole.items():
            rows[name] |= {"step_s": seconds_s, "share": seconds_s / sum(whole.values())}


class Silent:
    """A gauge for `worst_step` where the caller measures."""

    def start(self) -> None: ...

    def peak_bytes(self) -> int:
        return 0


def engines(out: Path, seconds: float, dry_run: bool) -> dict[str, Any]:
    """What `gpu_engines.py` measures; it stands beside this file."""
    measure = importlib.import_module("gpu_engines").measure
    return dict(measure(out, dry_run or seconds < QUICK_S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for gpu.json and the logs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=120.0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.part is None:
        found = measure_all(asked.out, asked.parts, asked.minutes, asked.dry_run)
        (asked.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        print(table(found))
        return
    sys.path.insert(0, str(Path(__file__).parent))  # which PYTHONSAFEPATH leaves out
    file = asked.out / f"{asked.part}.json"
    try:
        if asked.part == "engines":
            made = engines(asked.out, asked.seconds, asked.dry_run)
        else:
            made = step(asked.part, asked.out, asked.seconds, asked.dry_run)
    except BaseException as error:
        traceback.print_exc()
        made = (json.loads(file.read_text()) if file.is_file() else {}) | {"error": f"{type(error).__name__}: {error}"}
    file.write_text(json.dumps(made, indent=1) + "\n")
    sys.exit("error" in made)


if __name__ == "__main__":
    main()
