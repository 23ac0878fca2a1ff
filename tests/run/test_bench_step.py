"""`mel-lite bench step`: seconds, tokens and operations of a step, each in one phase."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from mel_lite.engines.merged import _Packed
from mel_lite.engines.metered import PhaseClock
from mel_lite.recipe import resolve
from mel_lite.run.bench_step import PHASES, bench_step
from mel_lite.run.operations import flop_counter
from task_files import write
from tiny_models import save_tiny


def test_the_counter_knows_products_and_the_attention_of_a_cpu() -> None:
    """2 M N K per product; attention is two products forward and five backward."""
    a, b = torch.randn(6, 5, requires_grad=True), torch.randn(5, 7)
    query, key, value = (torch.randn(2, 3, 8, 16, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        product = a @ b
    assert counter.get_total_flops() == 2 * 6 * 5 * 7
    with flop_counter() as counter:
        product.sum().backward()
    assert counter.get_total_flops() == 2 * 6 * 5 * 7
    one = 2 * 2 * 3 * 8 * 8 * 16
    with flop_counter() as counter:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert counter.get_total_flops() == 2 * one
    with flop_counter() as counter:
        attended.sum().backward()
    assert counter.get_total_flops() == 5 * one
    layer = torch.nn.Linear(5, 7)
    with torch.no_grad(), flop_counter() as counter:
        _Packed(layer, layer.weight.detach)(torch.randn(2, 3, 5))
    assert counter.get_total_flops() == 2 * 6 * 5 * 7


def test_every_change_of_phase_is_reported_with_the_phase_that_ends() -> None:
    clock, ended = PhaseClock(), []
    clock.on_change = ended.append
    with clock.rest("update"), clock("rollout"):
        pass
    with clock("verify"):
        pass
    assert ended == ["", "update", "rollout", "update", "", "verify"]


def test_a_step_is_charged_to_its_phases(tmp_path: Path) -> None:
    """With the overlapped schedule, two steps come before the one that is measured."""
    base = save_tiny(tmp_path / "base")
    tasks = write(tmp_path / "tasks.jsonl", [{"question": f"{i} + 1?", "answer": i + 1} for i in range(8)])
    sets = {
        "model.name": str(base), "data.train": str(tasks), "data.eval": None, "lora.start_from": None,
        "train.num_generations": 4, "train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 1,
        "train.max_completion_length": 12, "train.max_context_tokens": 380, "train.probe_max_diff": None,
        "train.mel_schedule": "overlap",
    }  # fmt: skip
    recipe = resolve(preset="cpu", overrides=list(sets.items()))
    cost = bench_step(recipe, console=Console(quiet=True))
    phases = {each.phase: each for each in cost.phases}
    assert list(phases) == list(PHASES)
    assert all(
        phases[name].seconds_s > 0 for name in ("rollout", "verify", "forward/backward", "optimizer", "checkpoint")
    )
    assert 8 <= phases["rollout"].generated_tokens <= 8 * 12
    # A forward per sampled token, and the prompts.
    assert phases["rollout"].forward_tokens > phases["rollout"].generated_tokens
    assert phases["rollout"].operations > 0 and phases["optimizer"].operations == 0
    assert phases["verify"].forward_tokens == 0 and phases["verify"].operations == 0
    assert cost.token_overhead == 0.0, "a random model has no mixed group"
    assert cost.time_overhead_s is not None and 0 <= cost.time_overhead_s < phases["rollout"].seconds_s
    assert cost.price.startswith("lessons: 0% more generated tokens than the rollouts, 0.00 s (0%) of the step")
    assert json.loads(cost.to_json())["phases"][0]["phase"] == "rollout"
