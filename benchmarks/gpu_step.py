"""One step of a preset at full size within its card's memory: peak, seconds and prediction of every phase."""

from __future__ import annotations

import importlib
import json
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

PROBE_TOKENS = 24
"""Tokens sampled first, to estimate how many fit into the time."""
TINY_STEP: dict[str, Any] = {
    "train.max_completion_length": 24, "train.analysis_max_tokens": 16, "train.max_context_tokens": 300,
    "data.max_prompt_tokens": 40, "train.max_micro_batch_tokens": 400, "train.max_cache_tokens": 500, "lora.r": 4,
    "train.optim": "adamw_torch", "train.use_cpu": True, "train.bf16": False, "train.fp16": False,
    "model.dtype": "float32", "train.gradient_checkpointing": True,
}  # fmt: skip


class Finished(Exception):
    """Raised to end `train` before its first step, when everything is measured."""


def step(part: str, out: Path, seconds: float, dry_run: bool) -> dict[str, Any]:
    """Measure peak and seconds of every phase of one preset's step, within its card's memory."""
    from mel_lite.memory.formulas import CONTEXT_BYTES
    from mel_lite.memory.plan import BUDGETS, plan_for
    from mel_lite.memory.vllm import VLLMCard
    from random_models import config_of, random_weights

    gpu, end_s = part.rpartition("-")[2], time.monotonic() + seconds
    name, config = config_of(gpu, dry_run)
    figures: dict[str, Any] = {"model": name, "gpu": gpu, "budget_bytes": BUDGETS[gpu], "phases": []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        random_weights(folder, config)
        overrides: list[tuple[str, Any]] = [("model.name", str(folder)), ("train.max_steps", 1)]
        overrides += list(TINY_STEP.items()) if dry_run else [("train.bf16", True), ("train.fp16", False)]
        overrides.append(("model.engine", "unsloth" if part.startswith("vllm") else "hf"))
        try:
            importlib.import_module("bitsandbytes")
        except Exception as error:  # a broken installation can raise anything; record it
            figures["without_4bit"] = f"{type(error).__name__}: {error}"
            overrides += [("model.load_in_4bit", False), ("train.optim", "adamw_torch")]
        recipe, made_plan, reason = plan_for(gpu, None, overrides, run_here=True)
        assert made_plan is not None, reason
        figures["engine"] = made_plan.engine.line
        figures |= {"choices": made_plan.choices, "fits": made_plan.fits, "load_in_4bit": recipe.model.load_in_4bit}
        if not made_plan.fits:
            return figures | {"error": made_plan.refusal()}
        if torch.cuda.is_available() and not made_plan.engine.vllm:  # PyTorch would count vLLM's sleeping cache
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (BUDGETS[gpu] - CONTEXT_BYTES) / total))
        if part.startswith("vllm") and not made_plan.engine.vllm:
            return figures | {"error": f"the plan does not use vLLM: {made_plan.engine.line}"}
        free, total = torch.cuda.mem_get_info() if made_plan.engine.vllm else (0, 0)
        card = VLLMCard(total, free) if made_plan.engine.vllm else None
        Measurement(recipe, figures, out / f"{part}.json", end_s, card).run(folder / "run")
    return figures


class Measurement:
    """Measurement of one step; every figure is written to the file at once, so that a crash loses none."""

    def __init__(self, recipe: Any, figures: dict[str, Any], file: Path, end_s: float, vllm_on: Any = None) -> None:
        from mel_lite.memory.plan import shape_for
        from mel_lite.memory.workload import workload
        from mel_lite.resilience.memory_gauge import gauge_here

        self.recipe, self.figures, self.file, self.end_s = recipe, figures, file, end_s
        self.load = workload(recipe, shape_for(recipe), vllm_on=vllm_on)
        self.trainer: Any = None
        self.gauge = gauge_here()  # before a model is loaded

    def run(self, folder: Path) -> None:
        """Load, start training, and measure the phases before the first step."""
        from datasets import Dataset
        from rich.console import Console
        from transformers import TrainerCallback

        from mel_lite import MELTrainer
        from mel_lite.models.load import load_tokenizer
        from mel_lite.recipe import build_args
        from mel_lite.run.load_model import load_for_training

        loaded: list[Any] = []
        args = build_args(self.recipe, folder)
        self.phase("load", lambda: loaded.extend(load_for_training(self.recipe, args, Console())))
        if "error" in self.figures["phases"][-1]:
            return
        args.verifier, args.disable_tqdm, args.save_strategy = "numeric", True, "no"
        tasks = Dataset.from_list([{"prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(64)])
        self.trainer = MELTrainer(
            loaded[0], args=args, train_dataset=tasks, processing_class=load_tokenizer(self.recipe.model),
            peft_config=loaded[1],
        )  # fmt: skip
        loaded.clear()
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
        """Measure the update first, which plans must predict, then scoring, optimizer, and sampling as time allows."""
        from mel_lite.resilience.worst_step import as_started, worst_step

        self.load = as_started(self.load, self.trainer.engine.unmetered)
        trainer, load = self.trainer, self.load
        states = self.predicted("update").parts["optimizer states"]
        for name in ("update", "scoring"):
            self.phase(name, lambda name=name: worst_step(trainer, load, NullGauge(), states_bytes=states, only=[name]))
        # Memory and speed of the steps that log no gradient norms, which are most steps.
        trainer.args.grad_norm_every = 0
        plain = replace(load, measures_gradients=False)
        self.phase(
            "update-plain",
            lambda: worst_step(trainer, plain, NullGauge(), states_bytes=states, only=["update"]),
            load=plain,
        )
        self.phase("optimizer", self.optimizer_step)
        names = list(load.sampled)
        for i, name in enumerate(names):
            self.sample(name, (self.end_s - time.monotonic()) / (len(names) - i))
        self.shares()

    def optimizer_step(self) -> None:
        """Take an optimizer step with constant gradients."""
        for weight in self.trainer.model.parameters():
            if weight.requires_grad:
                weight.grad = torch.full_like(weight, 1e-4)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()

    def sample(self, name: str, seconds: float) -> None:
        """Measure one round, as long as the time allows, and compare it with the prediction for that length."""
        from mel_lite.resilience.worst_step import worst_step

        if self.load.vllm is not None:
            self.sample_all(name, seconds)
            return

        key = "analysis_tokens" if name == "analysis" else "completion_tokens"
        at_once, full = self.load.at_once(name), getattr(self.load, key)

        def cut(tokens: int) -> Any:
            """Return the load with shorter completions, and the same sequences and prompts."""
            _, prompt, _ = self.load.sampled[name]
            shorter = replace(self.load, **{key: tokens}, max_cache_tokens=at_once * (prompt + tokens))
            if name == "replay":  # its prompt contains an analysis
                assert shorter.sampled[name][1] == prompt
            return shorter

        start_s = time.monotonic()
        try:
            worst_step(self.trainer, cut(min(PROBE_TOKENS, full)), NullGauge(), only=[name])
        except Exception as error:
            self.note({"name": name, "error": f"{type(error).__name__}: {error}"})
            return
        per_token_s = (time.monotonic() - start_s) / min(PROBE_TOKENS, full)
        tokens = min(full, max(PROBE_TOKENS, int(0.8 * seconds / per_token_s)))
        load = cut(tokens)
        self.phase(
            name, lambda: worst_step(self.trainer, load, NullGauge(), only=[name]), load=load,
            tokens=at_once * tokens, sequences=at_once, new_tokens=tokens, full_tokens=full,
        )  # fmt: skip

    def sample_all(self, name: str, seconds: float) -> None:
        """Measure all sequences of a phase at once, as with vLLM, with the optimizer states in memory."""
        from mel_lite.resilience.worst_step import sample_at_full_length

        sequences, _, full = self.load.sampled[name]
        start_s = time.monotonic()
        try:
            sample_at_full_length(self.trainer, self.load, name, min(PROBE_TOKENS, full), sequences=sequences)
        except Exception as error:
            self.note({"name": name, "error": f"{type(error).__name__}: {error}"})
            return
        per_token_s = (time.monotonic() - start_s) / min(PROBE_TOKENS, full)
        tokens = min(full, max(PROBE_TOKENS, int(0.8 * seconds / per_token_s)))
        self.trainer.engine.sleep()
        self.phase(
            name, lambda: sample_at_full_length(self.trainer, self.load, name, tokens, sequences=sequences),
            tokens=sequences * tokens, sequences=sequences, new_tokens=tokens, full_tokens=full,
        )  # fmt: skip

    def predicted(self, name: str, load: Any = None) -> Any:
        from mel_lite.memory.predict import predict

        return next(phase for phase in predict(load or self.load) if phase.name == name)

    def phase(self, name: str, work: Any, *, load: Any = None, tokens: int | None = None, **facts: Any) -> None:
        """Measure one phase, and record its figures or its error."""
        gauge, expected = self.gauge, self.predicted(name.removesuffix("-plain"), load)
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
        if self.trainer is not None:  # both are lowered after running out of memory
            cached = getattr(self.trainer.engine.unmetered, "_max_cache_tokens", None)
            row |= {"budget_tokens": self.trainer.budget_tokens, "max_cache_tokens": cached}
            row["lowered"] = self.trainer.budget_tokens != self.load.max_micro_batch_tokens
            row["lowered"] |= self.load.vllm is None and cached != self.load.max_cache_tokens
        if tokens:
            row |= {"tokens": tokens, "tokens_per_s": tokens / seconds_s}
        self.note(row)

    def note(self, row: dict[str, Any]) -> None:
        self.figures["phases"].append(row)
        self.file.write_text(json.dumps(self.figures, indent=1) + "\n")

    def shares(self) -> None:
        """Estimate the share of each phase in a step of full length, from the measured speeds."""
        load, whole = self.load, {}
        rows = {row["name"]: row for row in self.figures["phases"] if "tokens_per_s" in row}
        for name, (sequences, _, new_tokens) in load.sampled.items():
            if name in rows:
                rounds = 1 if load.vllm else -(-sequences // load.at_once(name))
                whole[name] = rounds * new_tokens * rows[name]["seconds_s"] / rows[name]["new_tokens"]
        if "update-plain" in rows:
            steps = load.completions // load.micro_batch
            whole["update-plain"] = steps * load.micro_batch_tokens / rows["update-plain"]["tokens_per_s"]
        for name, seconds_s in whole.items():
            rows[name] |= {"step_s": seconds_s, "share": seconds_s / sum(whole.values())}


class NullGauge:
    """Gauge for `worst_step` that measures nothing, because the caller measures."""

    def start(self) -> None: ...

    def peak_bytes(self) -> int:
        return 0
