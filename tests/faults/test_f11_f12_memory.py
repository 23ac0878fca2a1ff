"""F11, F12: out of memory in a micro-batch and in generation. The error is raised where torch raises it.

A real allocator's limit needs a GPU. Here a forward with more than a given number of tokens fails.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from mel_lite.engines import hf
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import EngineError
from tiny_models import tiny_config
from trainers import assert_learned, build, step_log, trainable

OPTIONS: dict[str, Any] = {"max_steps": 2, "optim": "sgd", "gradient_accumulation_steps": 2,
                           "per_device_train_batch_size": 8, "max_grad_norm": 0.0}  # fmt: skip


def limit(trainer: Any, tokens: int, *, in_backward: bool = False) -> list[int]:
    """Make forwards with gradient and more than `tokens` tokens run out of memory. Returns: the sizes tried."""
    backbone = trainer.model.get_base_model().model
    original, tried = backbone.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        size = kwargs["input_ids"].numel()
        if torch.is_grad_enabled() and not in_backward:
            tried.append(size)
            if size > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args, **kwargs)

    backbone.forward = forward
    if in_backward:
        backward = trainer.accelerator.backward

        def fails_once(loss: torch.Tensor, **kwargs: Any) -> None:
            tried.append(1 if loss.grad_fn is not None else 0)
            if sum(tried) == 2 and tried[-1]:  # the second of two micro-batches, with half of the gradient accumulated
                p = next(p for p in trainer.model.parameters() if p.requires_grad)
                p.grad += 1.0  # an incomplete backward leaves partial gradients
                raise torch.OutOfMemoryError("CUDA out of memory.")
            backward(loss, **kwargs)

        trainer.accelerator.backward = fails_once
    return tried


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_micro_batch_that_does_not_fit_is_split(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    # One micro-batch with both lessons, or two of which the second fails.
    options = OPTIONS | {"gradient_accumulation_steps": 1 if where == "forward" else 2, "grad_norm_every": 1}
    options |= {"share_prompts": False}  # padded, all steps have one size
    whole = build(tmp_path, output_dir=tmp_path / "whole", **options)
    sizes = limit(whole, 10**9)
    whole.train()
    largest = max(sizes)
    trainer = build(tmp_path, **options)
    steps = []
    trainer.create_optimizer()
    trainer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    tried = limit(trainer, largest - 1, in_backward=where == "backward")
    with caplog.at_level(logging.WARNING, "mel_lite.training.batches.micro_batches"):
        trainer.train()
    assert "Set max_micro_batch_tokens=" in caplog.text
    assert trainer.budget_tokens is not None and whole.budget_tokens is None
    assert len(steps) == 2, "one update per step, as without the error"
    expected, got = trainable(whole), trainable(trainer)
    for name, weight in expected.items():
        # SGD: the weights differ by learning rate x gradient, so this compares gradients.
        assert (got[name] - weight).norm() <= 1e-6 * max(1.0, float(weight.norm())), name
    assert len(trainer.engine.unmetered.calls) == len(whole.engine.unmetered.calls), "nothing is sampled again"
    assert [row["mel/trained_tokens"] for row in step_log(tmp_path / "run")] == [
        row["mel/trained_tokens"] for row in step_log(tmp_path / "whole")
    ]
    if where == "forward":
        assert tried[0] == largest and all(size < largest for size in tried[1:]), "the next ones are smaller, too"
    measured = [row.get("mel/grad_norm_policy") for row in step_log(tmp_path / "run")]
    reference = [row["mel/grad_norm_policy"] for row in step_log(tmp_path / "whole")]
    assert measured == [None, pytest.approx(reference[1], rel=1e-3)], "half of a step has no norm"
    assert_learned(trainer)


@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_row_that_does_not_fit_raises_the_original_error(tmp_path: Path, share_prompts: bool) -> None:
    """`mel-lite train` converts it to advice and exit code 6. Every size is tried once."""
    trainer = build(tmp_path, algorithm="grpo", share_prompts=share_prompts, **OPTIONS)
    tried = limit(trainer, 10)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert len(set(tried)) >= 3 and tried == sorted(tried, reverse=True), "every size is tried once"
    assert trainer.budget_tokens == tried[-1], "one row"


def test_generation_halves_its_batch_and_samples_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config())
    requests = [Request(tuple(range(5, 9 + i % 3)), i) for i in range(8)]
    expected = HFEngine(model, eos_ids=[2], pad_id=0).generate(requests, Sampling(8))
    original, sizes = hf.decode, []

    def decode(model: Any, cache: Any, ids_BP: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(ids_BP))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, cache, ids_BP, *arguments, **options)

    monkeypatch.setattr(hf, "decode", decode)
    got = HFEngine(model, eos_ids=[2], pad_id=0).generate(requests, Sampling(8))
    assert [c.ids for c in got] == [c.ids for c in expected]
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) <= 4

    monkeypatch.setattr(hf, "decode", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(EngineError, match="Out of memory while sampling one sequence"):
        HFEngine(model, eos_ids=[2], pad_id=0).generate(requests[:1], Sampling(8))
