"""F14, F15, F20, F21, F22: spikes, missing rewards, a dead engine, a wrong adapter, a sampler that is not the policy.

test_f20_engine_process.py tests an engine whose process dies. F21 and F22 concern an engine with a copy of the weights.
The transformers engine samples from the model that is trained, so no adapter can be stale or applied twice. These tests
check that log-probs other than the trainer's are detected, at the tolerance that such an engine must meet.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mel_lite import MELConfig
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import EngineError
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.collapse import WINDOW, CollapseChecks
from mel_lite.training.batches.packing import Row, pack
from mel_lite.training.scoring import install_scoring_head, score
from scripted import ScriptedEngine
from tiny_models import set_lora, tiny_tokenizer
from trainers import LORA, assert_learned, build, run_state, step_log, tiny_model

# ---- F14 ----


def test_a_spike_is_clipped_reported_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build(tmp_path, algorithm="grpo", max_steps=WINDOW + 2, max_grad_norm=0.5, learning_rate=1e-4)
    original = trainer._compute_loss
    norms: list[float] = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer.add_callback(Norms())

    def spiked(model: Any, inputs: Any) -> torch.Tensor:
        # The same size at each step but one, unlike a policy gradient, which is zero when all answers are right.
        size = sum((p**2).sum() for n, p in trainer.model.named_parameters() if "lora_A" in n)
        return original(model, inputs) * 0 + size * (50 if trainer.state.global_step == WINDOW else 1)

    trainer._compute_loss = spiked
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.collapse"):
        trainer.train()
    assert caplog.text.count("times its median") == 1 and f"Step {WINDOW + 1}: The gradient norm is" in caplog.text
    logged = [row["grad_norm"] for row in step_log(tmp_path / "run")]
    assert logged[WINDOW] == pytest.approx(50 * logged[WINDOW - 1], rel=0.05)
    assert max(norms) <= 0.5 + 1e-4, "clipped before the update"


def test_no_spike_among_ordinary_norms() -> None:
    wires = CollapseChecks()
    ordinary = [{"grad_norm": 1 + 0.9 * math.sin(i)} for i in range(200)]
    assert [wires.spike(log) for log in ordinary] == [None] * 200
    assert wires.spike({"grad_norm": 100.0}) is not None
    assert wires.spike({"grad_norm": float("nan")}) is None and wires.spike({}) is None


# ---- F15 ----

NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "advantages"),
    [
        # One group of four. TRL divides by the sample standard deviation plus 1e-4. Computed by hand.
        ([1, 1, 0, 0], [0.8659, 0.8659, -0.8659, -0.8659]),
        ([1, 0, 0, None], [1.1545, -0.5773, -0.5773, 0]),  # mean 1/3, std 0.5774 of the rewards that are not missing
        ([1, 0, None, None], [0.7070, -0.7070, 0, 0]),
        ([1, None, None, None], [0, 0, 0, 0]),
        ([None, None, None, None], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 0, 0, 0]),
        ([1, NAN, 0, 0], [1.1545, 0, -0.5773, -0.5773]),
    ],
)
def test_missing_rewards_are_out_of_the_mean_and_get_no_gradient(
    tmp_path: Path, rewards: list[float | None], advantages: list[float]
) -> None:
    def reward(completions: Any, **_: Any) -> list[float | None]:
        return (rewards * 2)[: len(completions)]

    trainer = build(tmp_path, algorithm="grpo", reward_funcs=reward, max_steps=1)
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4 + [trainer.train_dataset[1]] * 4)
    assert batch["advantages"].tolist() == pytest.approx(advantages * 2, abs=2e-3)
    trainer.current_gradient_accumulation_steps = 1
    assert trainer._compute_loss(trainer.model, batch).isfinite()


def test_a_reward_function_that_raises_is_not_hidden(tmp_path: Path) -> None:
    def broken(completions: Any, **_: Any) -> list[float]:
        raise KeyError("column")

    with pytest.raises(KeyError, match="column"):
        build(tmp_path, algorithm="grpo", reward_funcs=broken, max_steps=1).train()


# ---- F20 ----


class Fails(ScriptedEngine):
    """Engine that raises in the middle of a batch at some calls."""

    def __init__(self, *at: int) -> None:
        super().__init__(tiny_tokenizer())
        self.at, self.count, self.woken = at, 0, 0

    def wake(self) -> None:
        self.woken += 1

    def generate(self, requests: Any, sampling: Any) -> Any:
        self.count += 1
        if self.count in self.at:
            raise ConnectionResetError("worker died")
        return super().generate(requests, sampling)


def test_an_engine_that_dies_once_is_restarted_and_samples_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = build(tmp_path, output_dir=tmp_path / "whole", engine=Fails())
    whole.train()
    engine = Fails(2, 5)
    trainer = build(tmp_path, engine=engine)
    with caplog.at_level(logging.WARNING, "mel_lite.training.metrics"):
        trainer.train()
    assert caplog.text.count("Restarting it") == 2
    assert engine.woken >= 2
    assert run_state(trainer) == run_state(whole)
    assert step_log(tmp_path / "run") == step_log(tmp_path / "whole")
    assert_learned(trainer)


@pytest.mark.slow
def test_one_that_dies_twice_saves_and_stops(tmp_path: Path) -> None:
    trainer = build(tmp_path, engine=Fails(5, 6), max_steps=4, save_strategy="steps", save_steps=4)
    with pytest.raises(EngineError, match=r"failed twice .*worker died.*Saved checkpoint-1") as error:
        trainer.train()
    assert error.value.exit_code == 6
    assert checkpoint_files.problem(tmp_path / "run" / "checkpoint-1") is None
    resumed = build(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    resumed.train(resume_from_checkpoint=True)
    whole = build(tmp_path, output_dir=tmp_path / "whole", max_steps=4)
    whole.train()
    assert run_state(resumed) == run_state(whole)


# ---- F21, F22 ----


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.95}, {"top_k": 20}, {"min_p": 0.05}, {"repetition_penalty": 1.1},
     {"generation_kwargs": {"top_p": 0.9}}, {"generation_kwargs": {"top_p": 0.9}, "algorithm": "grpo"}],
    ids=lambda options: " ".join(options),
)  # fmt: skip
def test_truncated_sampling_is_followed_with_one_warning(tmp_path: Path, options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    name, value = next(iter(value.items())) if isinstance(value, dict) else (name, value)
    with pytest.warns(UserWarning, match=f"{name}={value} changes the sampling distribution") as caught:
        trainer = build(tmp_path, max_steps=1, **options)
    assert len([each for each in caught if f"Leave {name} unset" in str(each.message)]) == 1
    trainer.train()
    requests, sampling = trainer.engine.unmetered.calls[0]
    assert len(requests) == 8 and getattr(sampling, name) == value
    assert_learned(trainer)


def test_a_temperature_in_generation_kwargs_is_that_of_every_phase(tmp_path: Path) -> None:
    trainer = build(tmp_path, generation_kwargs={"temperature": 0.5})
    context = trainer.lesson_context
    found = trainer.temperature, trainer.policy_temperature, context.analysis.temperature, context.replay.temperature
    assert found == (0.5,) * 4


def test_sampling_is_not_restricted_if_the_loss_ignores_the_sampler() -> None:
    assert MELConfig("out", use_cpu=True, bf16=False, algorithm="rft", top_p=0.9).top_p == 0.9
    whole = MELConfig("out", use_cpu=True, bf16=False, top_p=1.0, top_k=0, min_p=None, temperature=0.7)
    assert whole.temperature == 0.7


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_the_temperature_of_sampling_is_that_of_scoring(tmp_path: Path, temperature: float) -> None:
    """Compares the engine's log-probs of a real step with the trainer's, token by token."""
    model = tiny_model(tmp_path / "base")
    engine = HFEngine(model, eos_ids=[2], pad_id=0)
    trainer = build(
        tmp_path, model=model, engine=engine, algorithm="grpo", reward_funcs=_lengths, temperature=temperature
    )
    sampled: list[list[float]] = []
    roll_out = trainer.rollout_func

    def spy(*args: Any) -> Any:
        result = roll_out(*args)
        sampled.extend(result["logprobs"])
        return result

    trainer.rollout_func = spy
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4 + [trainer.train_dataset[1]] * 4)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    trainer.model.eval()
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1]
        )
    for row, own, kept in zip(sampled, logps, batch["completion_mask"].bool(), strict=True):
        assert (torch.tensor(row) - own[kept]).abs().max() < 1e-4
    assert sum(map(len, sampled)) == int(batch["completion_mask"].sum()) > 0


def _lengths(completions: Any, **_: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


@pytest.mark.parametrize(("fault", "differs"), [("none", False), ("doubled adapter", True), ("logits x 1.2", True),
                                                ("truncated sampling", True)])  # fmt: skip
def test_a_sampler_that_is_not_the_policy_shows_in_its_log_probs(tmp_path: Path, fault: str, differs: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(tmp_path / "base"), LoraConfig(**LORA))
    set_lora(model, 0.2)
    install_scoring_head(model.get_base_model())
    engine = HFEngine(model, eos_ids=[2], pad_id=0)
    requests = [Request(tuple(range(10, 20)), seed) for seed in range(4)]
    sampling = Sampling(12, top_p=0.8 if fault == "truncated sampling" else 1.0)
    scaling = [m for m in model.modules() if hasattr(m, "scaling") and isinstance(m.scaling, dict)]
    handle = None
    if fault == "doubled adapter":
        for module in scaling:
            module.scaling["default"] *= 2
    elif fault == "logits x 1.2":
        handle = model.get_output_embeddings().register_forward_hook(lambda *a: a[-1] * 1.2)
    done = engine.generate(requests, sampling)
    if fault == "doubled adapter":
        for module in scaling:
            module.scaling["default"] /= 2
    elif handle is not None:
        handle.remove()
    model.eval()
    rows = [Row(torch.tensor(r.prompt_ids + c.ids), len(c.ids)) for r, c in zip(requests, done, strict=True)]
    with torch.no_grad():
        logps, *_ = score(model, pack(rows, pad_id=0))
    gap = max(float((torch.tensor(c.logprobs) - p).abs().max()) for c, p in zip(done, logps, strict=True))
    assert (gap > 1e-2) == differs, gap
    assert differs or gap < 1e-4, "same engine, CPU, float32: at most 1e-4 nats"
