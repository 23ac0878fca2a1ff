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

from fake_vllm import trainer_with_fake_vllm
from live_bytes import LiveBytes
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import ConfigError
from mel_lite.memory.formulas import shape_of
from mel_lite.memory.predict import Phase, predict
from mel_lite.memory.vllm import VLLMCard, VLLMShare
from mel_lite.memory.workload import Workload, workload
from mel_lite.recipe import resolve
from mel_lite.resilience import worst_step as worst_step_module
from mel_lite.resilience.memory_gauge import GpuGauge, HostGauge
from mel_lite.resilience.worst_step import PhasePeak, WorstStepFirst, as_started, worst_step
from scripted import ScriptedEngine, default_answer
from tiny_models import tiny_tokenizer
from trainers import assert_learned, build, even_ids, run_state, step_log, tiny_model

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
    # The plan is for padded rows, as on a GPU.
    return build(tmp_path, model=model, engine=engine, **{**SIZES, "share_prompts": False, **options})


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
            records = (dict(self.trainer._metrics["train"]), self.trainer.trained_lessons)
            return (
                run_state(self.trainer),
                rng_digest(),
                grads,
                records,
                self.trainer.model.training,
                self.trainer._step,
            )

        before = everything()
        gauge = LiveGauge()
        try:
            self.peaks = worst_step(self.trainer, self.load, gauge)
        finally:
            gauge.close()
        assert everything() == before


@pytest.mark.slow
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
    assert_learned(trainer)


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
    predicted = [Phase(name, 100, {"optimizer states": 8}) for name in order]
    report = lambda peaks, change: shown.append((peaks, change))  # noqa: E731
    return WorstStepFirst(trainer, load, predicted, report, gauge=Scripted(), budget_bytes=budget)


def predicted_sizes(load: Workload) -> dict[str, int]:
    return {phase.name: phase.bytes for phase in predict(load)}


def test_what_passes_the_budget_is_halved_and_measured_again(tmp_path: Path) -> None:
    trainer = trainer_with_real_engine(tmp_path, max_micro_batch_tokens=700)
    load, shown = load_of(trainer, max_micro_batch_tokens=700), []
    sizes = {"rollout": [300, 100], "analysis": [90], "replay": [90], "scoring": [90], "update": [500, 120]}
    trainer.create_optimizer()
    first(trainer, load, sizes, 150, shown).on_train_begin(None, None, None)
    (before, change), (after, nothing) = shown
    assert [peak.name for peak in before] == ["rollout", "analysis", "replay", "scoring", "update"]
    now = predicted_sizes(replace(load, max_micro_batch_tokens=350, max_cache_tokens=4 * 56))
    assert before[-1] == PhasePeak("update", 100, 500) and after[-1] == PhasePeak("update", now["update"], 120)
    assert after[0].predicted_bytes == now["rollout"] != predicted_sizes(load)["rollout"]
    assert now["update"] < predicted_sizes(load)["update"], "each attempt is compared with the plan of its own settings"
    assert change == f"--set train.max_cache_tokens={4 * 56} --set train.max_micro_batch_tokens=350" and not nothing
    assert trainer.budget_tokens == 350 and trainer.engine.unmetered._max_cache_tokens == 4 * 56


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


def test_scoring_and_update_that_are_both_too_much_are_halved_once(tmp_path: Path) -> None:
    trainer = trainer_with_real_engine(tmp_path, max_micro_batch_tokens=700)
    load, shown = load_of(trainer, max_micro_batch_tokens=700), []
    sizes = {"rollout": [300, 100], "analysis": [300, 90], "replay": [90], "scoring": [500, 90], "update": [500, 120]}
    trainer.create_optimizer()
    first(trainer, load, sizes, 150, shown).on_train_begin(None, None, None)
    # Rollouts are 8 of 56 tokens, analyses 2 of 332: half of either, and the smaller bound holds for both.
    assert shown[0][1] == "--set train.max_cache_tokens=224 --set train.max_micro_batch_tokens=350"


def test_the_phase_that_runs_out_of_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_with_real_engine(tmp_path)
    trainer.create_optimizer()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(worst_step_module, "_score", full)
    fine, shown = {name: [90] for name in ("rollout", "analysis", "replay")}, []
    step = first(trainer, load_of(trainer), fine, 150, shown)
    monkeypatch.setattr(step._gauge, "peak_bytes", lambda: 90)
    with pytest.raises(ConfigError, match="scoring runs out of memory of the 0.0 GiB there are.*max_completion_length"):
        step.on_train_begin(None, None, None)
    assert [(peaks[0].name, peaks[0].measured_bytes) for peaks, _ in shown] == [("scoring", None)] * len(shown)
    tokens = [int(change.rpartition("=")[2]) for _, change in shown]
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] == 332, "halved down to the longest row first"


def test_the_error_names_the_share_when_vllm_does_not_wake_next_to_the_states(tmp_path: Path) -> None:
    trainer, llm = trainer_with_fake_vllm(build, tmp_path, fault="does not wake", **SIZES)
    trainer.create_optimizer()
    step = first(trainer, vllm_load(trainer), {"rollout": [90]}, 2**33, [])
    with pytest.raises(ConfigError, match=r"rollout runs out of memory.*gpu_memory_utilization=0.45 \(now 0.50\)"):
        step.on_train_begin(None, None, None)
    assert llm.events == ["sleep 1"]


def test_no_share_is_advised_that_is_too_small_to_start_with(tmp_path: Path) -> None:
    trainer, _ = trainer_with_fake_vllm(build, tmp_path, **SIZES)
    trainer.create_optimizer()
    load = vllm_load(trainer)
    least = load.share_of(0) / 2**33
    sizes = {name: [2**20] for name in ("analysis", "replay", "scoring", "update")}
    step = first(trainer, vllm_load(trainer, least + 0.005), {**sizes, "rollout": [5 * 2**30]}, 4 * 2**30, [])
    message = f"No smaller share serves sequences of {load.vllm_context_tokens} tokens: lower train.max_completion_len"
    with pytest.raises(ConfigError, match=message):
        step.on_train_begin(None, None, None)


def test_the_error_for_states_that_do_not_fit_names_the_options_that_shrink_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_with_real_engine(tmp_path)
    trainer.create_optimizer()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    step = first(trainer, load_of(trainer), {"rollout": [90]}, 150, [])
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(ConfigError, match="optimizer's states do not fit.*train.optim=paged_adamw_8bit, lower lora.r"):
        step.on_train_begin(None, None, None)


def test_a_step_is_predicted_with_the_share_vllm_was_started_with(tmp_path: Path) -> None:
    trainer, _ = trainer_with_fake_vllm(build, tmp_path, **SIZES)
    engine = trainer.engine.unmetered.inner
    engine.share, engine.max_num_seqs = 0.31, 5
    load = as_started(vllm_load(trainer), engine)
    assert load.vllm is not None and (load.vllm.utilization, load.vllm.sequences) == (0.31, 5)
    assert load.share_bytes == int(0.31 * 2**33)
    engine.share = None  # not known: as planned
    assert as_started(vllm_load(trainer), engine).share_bytes == 2**32
    plain = load_of(trainer)
    assert as_started(plain, trainer.engine.unmetered) is plain


def test_states_are_there_while_vllm_wakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, llm = trainer_with_fake_vllm(build, tmp_path, **SIZES)
    empty, held = torch.empty, []

    def noted(*size: Any, **options: Any) -> Any:
        if options.get("dtype") is torch.uint8:
            held.append((size, llm.asleep))
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", noted)
    worst_step(trainer, vllm_load(trainer), LiveGauge(), states_bytes=12345, only=["rollout"])
    assert held == [((12345,), True)] and llm.events[:2] == ["sleep 1", "wake"]


# ---- with vLLM -------------------------------------------------------------------------------------------------------


def vllm_load(trainer: Any, utilization: float = 0.5) -> Workload:
    return replace(load_of(trainer), scores_rollouts=True, vllm=VLLMShare(VLLMCard(2**33, 2**33), 8, 64, utilization))


def test_vllm_wakes_next_to_the_states_and_sleeps_during_scoring_and_training(tmp_path: Path) -> None:
    trainer, llm = trainer_with_fake_vllm(build, tmp_path, reward_funcs=even_ids, **SIZES)
    asleep: list[tuple[str, bool]] = []
    for name in ("_get_per_token_logps_and_entropies", "compute_loss"):
        original = getattr(trainer, name)

        def watched(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            asleep.append((name, llm.asleep))
            return original(*args, **kwargs)

        setattr(trainer, name, watched)
    checks = Before(trainer, vllm_load(trainer))
    trainer.add_callback(checks)
    trainer.train()
    assert set(checks.peaks) == {"rollout", "analysis", "replay", "scoring", "update"}
    worst = llm.calls[:3]
    assert [(len(call.prompts), call.params[0].max_tokens) for call in worst] == [(8, 16), (2, 16), (2, 16)]
    assert all(call.params[0].ignore_eos for call in worst), "few tokens, of all sequences"
    assert llm.events[:3] == ["sleep 1", "wake", "sleep 1"], "it had to find its memory again"
    assert {name for name, _ in asleep} == {"_get_per_token_logps_and_entropies", "compute_loss"}
    assert all(state for _, state in asleep), "in the worst step and in the real ones"
    assert_learned(trainer)


def test_a_share_that_is_too_large_stops_the_run_with_one_that_is_not(tmp_path: Path) -> None:
    trainer, _ = trainer_with_fake_vllm(build, tmp_path, **SIZES)
    trainer.create_optimizer()
    sizes = {name: [2**30] for name in ("analysis", "replay", "scoring", "update")}
    step = first(trainer, vllm_load(trainer), {**sizes, "rollout": [5 * 2**30]}, 4 * 2**30, [])
    with pytest.raises(ConfigError, match=r"rollout takes 5.0 GiB of the 4.0 .*utilization=0.37 \(now 0.50\).*hf"):
        step.on_train_begin(None, None, None)


class FakeDevice:
    """What the gauge asks PyTorch for, in MiB: memory of the device, and what the allocator says it holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used, self.reserved, self.peak = 0, 0, 0
        for name, answer in {
            "mem_get_info": lambda: ((8192 - self.used) * 2**20, 8192 * 2**20),
            "memory_reserved": lambda: self.reserved * 2**20,
            "max_memory_reserved": lambda: self.peak * 2**20,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.reserved),
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))


@pytest.mark.parametrize("counts_sleeping_cache", [True, False])
def test_the_gauge_sees_what_is_mapped_whoever_counts_it(
    monkeypatch: pytest.MonkeyPatch, counts_sleeping_cache: bool
) -> None:
    """A sleeping cache of 3000 MiB is not on the device, though PyTorch may still count it as held."""
    device = FakeDevice(monkeypatch)
    device.used = 900  # another program's and the context
    gauge = GpuGauge()
    device.used, device.reserved = 900 + 2000, 2000  # a model
    gauge.start()
    device.used, device.peak = 900 + 2000 + 3000, 2000 + 3000 * counts_sleeping_cache  # vLLM's cache
    device.reserved = device.peak
    assert gauge.peak_bytes() == (5000 + 600) * 2**20
    device.used -= 3000  # asleep
    gauge.start()
    device.peak, device.reserved = device.peak + 1500, device.reserved + 500
    device.used += 500  # 1500 at the peak, of which 1000 were given back
    assert gauge.peak_bytes() == (2000 + 1500 + 600) * 2**20


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
