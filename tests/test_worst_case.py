"""The worst step first: it measures what a step takes, adapts or refuses, and leaves the run as it was."""

from __future__ import annotations

import mmap
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from live_bytes import LiveBytes
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import ConfigError
from mel_lite.memory import shape_of
from mel_lite.presets import resolve
from mel_lite.workload import Phase, Workload, workload
from mel_lite.worst_case import HostGauge, PhasePeak, WorstStepFirst, worst_step
from scripted import ScriptedEngine, default_answer
from tiny_models import tiny_tokenizer
from trainers import assert_learnt, build, run_state, step_log, tiny_model

SIZES = {"max_completion_length": 16, "analysis_max_tokens": 32, "max_context_tokens": 300, "num_generations": 4}


class LiveGauge:
    """Live bytes of tensors, counted operator by operator."""

    def __init__(self) -> None:
        self._live: Any = None

    def start(self) -> None:
        self.close()
        self._live = LiveBytes()
        self._live.__enter__()

    def peak_bytes(self) -> int:
        peak = int(self._live.peak_bytes)
        self.close()
        return peak

    def close(self) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
        self._live = None


def load_of(trainer: Any, **train: Any) -> Workload:
    """The workload of a trainer of `build`, with prompts of 40 tokens."""
    options = {**SIZES, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "use_cpu": True, **train}
    overrides = [("model.name", "x"), ("data.max_prompt_tokens", 40), *((f"train.{k}", v) for k, v in options.items())]
    recipe = resolve(overrides=overrides)
    recipe = replace(recipe, model=replace(recipe.model, dtype="float32"))
    return workload(recipe, shape_of(trainer.model.config.to_dict()))


def trainer_with_real_engine(tmp_path: Path, **options: Any) -> Any:
    model = tiny_model(tmp_path / "base")
    engine = HFEngine(model, eos_ids=[2], pad_id=0)
    return build(tmp_path, model=model, engine=engine, **{**SIZES, **options})


def answer(question: str, rng: random.Random) -> str:
    """As scripted, and something on made-up tokens."""
    return default_answer(question, rng) if "plus" in question else "?"


def rng_digest() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()


class Before(TrainerCallback):
    """Takes a worst step when training begins, and looks at everything before and after it."""

    def __init__(self, trainer: Any, load: Workload) -> None:
        self.trainer, self.load = trainer, load
        self.peaks: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        def everything() -> tuple[Any, ...]:
            grads = [p.grad for p in self.trainer.model.parameters()]
            noted = (dict(self.trainer._metrics["train"]), self.trainer._trained, self.trainer._micro_batches)
            return run_state(self.trainer), rng_digest(), grads, noted, self.trainer.model.training, self.trainer._step

        before = everything()
        gauge = LiveGauge()
        try:
            self.peaks = worst_step(self.trainer, self.load, gauge)
        finally:
            gauge.close()
        assert everything() == before


def test_nothing_of_the_run_changes(tmp_path: Path) -> None:
    plain = build(tmp_path, output_dir=tmp_path / "plain", grad_norm_every=1)
    plain.train()
    trainer = build(tmp_path, grad_norm_every=1, engine=ScriptedEngine(tiny_tokenizer(), answer=answer))
    checks = Before(trainer, load_of(trainer, analysis_max_tokens=200, grad_norm_every=1))
    trainer.add_callback(checks)
    trainer.train()
    assert set(checks.peaks) == {"rollout", "analysis", "replay", "scoring", "update"}
    assert checks.peaks["update"] > 1e6
    assert run_state(trainer) == run_state(plain), "the run is the same as without"
    assert step_log(tmp_path / "run") == step_log(tmp_path / "plain")
    assert_learnt(trainer)


def test_everything_is_at_full_length(tmp_path: Path) -> None:
    """Sampling goes on past the end of a sequence; every row of the update has its longest length."""
    trainer = trainer_with_real_engine(tmp_path, max_micro_batch_tokens=400)
    load = load_of(trainer, max_micro_batch_tokens=400)
    engine, seen = trainer.engine, []
    generate = engine.generate

    def sampled(requests: Any, sampling: Any) -> Any:
        done = generate(requests, sampling)
        seen.append([(len(r.prompt_ids), len(c.ids)) for r, c in zip(requests, done, strict=True)])
        return done

    engine.generate = sampled
    sizes: list[tuple[int, ...]] = []
    backbone = trainer.model.get_base_model().model
    original = backbone.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append(tuple(kwargs["input_ids"].shape))
        return original(*args, **kwargs)

    backbone.forward = forward
    trainer.create_optimizer()
    worst_step(trainer, load, LiveGauge())
    replay = load.sampled["replay"]
    assert seen == [[(40, 16)] * 8, [(300, 32)] * 2, [(replay[1], 16)] * 2]
    assert max(rows * width for rows, width in sizes) >= 0.95 * 400 and (1, 332) in sizes
    assert all(rows * width <= 400 for rows, width in sizes)


def first(trainer: Any, load: Workload, sizes: dict[str, list[int]], budget: int | None, shown: list[Any]) -> Any:
    """A WorstStepFirst whose gauge reads the given bytes off, a list per phase."""

    class Scripted:
        def start(self) -> None: ...

        def peak_bytes(self) -> int:
            name = order[self.at % len(order)]
            self.at += 1
            return sizes[name].pop(0) if len(sizes[name]) > 1 else sizes[name][0]

        at = 0

    order = ["rollout", "analysis", "replay", "scoring", "update"]
    predicted = [Phase(name, 100, {"optimiser states": 8}) for name in order]
    report = lambda peaks, change: shown.append((peaks, change))  # noqa: E731
    return WorstStepFirst(trainer, load, predicted, report, gauge=Scripted(), budget_bytes=budget)


def test_what_passes_the_budget_is_halved_and_measured_again(tmp_path: Path) -> None:
    trainer = trainer_with_real_engine(tmp_path, max_micro_batch_tokens=700)
    load, shown = load_of(trainer, max_micro_batch_tokens=700), []
    sizes = {"rollout": [300, 100], "analysis": [90], "replay": [90], "scoring": [90], "update": [500, 120]}
    trainer.create_optimizer()
    first(trainer, load, sizes, 150, shown).on_train_begin(None, None, None)
    (before, change), (after, nothing) = shown
    assert [peak.name for peak in before] == ["rollout", "analysis", "replay", "scoring", "update"]
    assert before[-1] == PhasePeak("update", 100, 500) and after[-1] == PhasePeak("update", 100, 120)
    assert change == f"--set train.max_cache_tokens={4 * 56} --set train.max_micro_batch_tokens=350" and not nothing
    assert trainer.budget_tokens == 350 and trainer.engine._engine._max_concurrent == 4


def test_what_cannot_fit_stops_the_run_with_the_knob_to_turn(tmp_path: Path) -> None:
    trainer = trainer_with_real_engine(tmp_path, max_micro_batch_tokens=700)
    load = load_of(trainer, max_micro_batch_tokens=700)
    trainer.create_optimizer()
    fine = {name: [90] for name in ("rollout", "analysis", "replay", "scoring")}
    trainer.add_callback(first(trainer, load, {**fine, "update": [2**30]}, 2**29, []))
    with pytest.raises(ConfigError, match="update takes 1.0 GiB of the 0.5 GiB there are.*Lower train.max_context_tok"):
        trainer.train()
    assert trainer.budget_tokens == 332, "down to one row"
    assert trainer.state.global_step == 0


def test_a_scripted_engine_cannot_sample_less(tmp_path: Path) -> None:
    trainer = build(tmp_path, engine=ScriptedEngine(tiny_tokenizer(), answer=answer), **SIZES)
    trainer.create_optimizer()
    sizes = {name: [90] for name in ("analysis", "replay", "scoring", "update")}
    step = first(trainer, load_of(trainer), {**sizes, "rollout": [300]}, 150, [])
    with pytest.raises(ConfigError, match="Lower train.max_completion_length"):
        step.on_train_begin(None, None, None)


def test_the_host_gauge_sees_what_is_allocated() -> None:
    gauge = HostGauge()
    gauge.start()
    before = gauge.peak_bytes()
    # Straight from the system: an allocator may hand out memory that is resident already.
    held = mmap.mmap(-1, 64 * 2**20)
    for page in range(0, len(held), mmap.PAGESIZE):
        held[page] = 1
    assert gauge.peak_bytes() - before > 48 * 2**20
    held.close()
    gauge.start()
    assert gauge.peak_bytes() - before < 48 * 2**20
