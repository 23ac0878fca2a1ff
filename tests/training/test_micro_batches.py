"""Micro-batches taken in parts under a token budget: the gradient, loss and metrics of the whole."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from batches import LOSS_TYPES, micro_batch, with_lessons
from mel_lite.errors import ConfigError
from mel_lite.models import attention
from mel_lite.training.batches.packing import Row, area_tokens, deal, pack
from mel_lite.training.savings import why_not_shared_by
from mel_lite.types import Lesson
from tiny_models import set_lora
from trainers import assert_learned, step_log, trainable
from trainers import build as build_trainer

LESSONS = (Lesson(1, tuple(range(10, 40)), tuple(range(100, 120))), Lesson(2, tuple(range(20, 30)), (7, 8, 9)))
LESSON_TOKENS = sum(len(lesson.context_ids + lesson.target_ids) for lesson in LESSONS)


PADDED = {"share_prompts": False, "skip_zero_advantage": False}


def build(folder: Path, **options: Any) -> Any:
    """A trainer that pads all rows, unless the options say otherwise."""
    return build_trainer(folder, **{**PADDED, **options})


def by_default(folder: Path, **options: Any) -> Any:
    """A trainer that saves what it can."""
    return build_trainer(folder, **{"skip_zero_advantage": None, **options})


def watch(trainer: Any) -> list[int]:
    """Padded tokens of every forward pass of the backbone with a gradient."""
    backbone = trainer.model.get_base_model().model
    original, seen = backbone.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            seen.append(kwargs["input_ids"].numel())
        return original(*args, **kwargs)

    backbone.forward = forward
    return seen


def taken(
    folder: Path, tokens: int | None, inputs: dict[str, Any], **options: Any
) -> tuple[Any, dict[str, torch.Tensor], float, list[int]]:
    """Trainer, gradients, loss and forward sizes of one micro-batch under a budget."""
    trainer = build(folder, max_micro_batch_tokens=tokens, **options)
    set_lora(trainer.model, 0.2)
    trainer.current_gradient_accumulation_steps = 2
    seen = watch(trainer)
    trainer.model.train()
    if tokens is None:  # as TRL does
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
    else:
        loss = trainer.compute_loss(trainer.model, inputs)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return trainer, grads, loss.item(), seen


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 2e-5) -> None:
    assert got.keys() == expected.keys() and expected
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= relative * grad.norm() + 1e-9, name


def metrics(trainer: Any) -> dict[str, list[float]]:
    return {name: values for name, values in trainer._metrics["train"].items() if values}


TAUGHT: dict[str, Any] = {
    "internalisation": {"analysis": 1.0, "distill": 0.5},
    "internalisation_options": {"distill": {"context": "sibling"}},
}


def with_teachers(inputs: dict[str, Any], seed: int = 3) -> dict[str, Any]:
    """The micro-batch with teachers at about half of its tokens, at none of its second row."""
    generator = torch.Generator().manual_seed(seed)
    mask_BC = inputs["completion_mask"].bool() & (torch.rand(4, 6, generator=generator) < 0.5)
    mask_BC[1] = False
    hidden_BKH = torch.randn(4, int(mask_BC.sum(dim=1).max()), 64, generator=generator)
    return inputs | {"teacher_mask": mask_BC, "teacher_hidden": hidden_BKH}


CASES = [
    *[({"loss_type": name}, ()) for name in LOSS_TYPES],
    *[({"loss_type": name, "beta": 0.04}, LESSONS) for name in ("grpo", "dapo", "bnpo")],
    ({"temperature": 0.7, "importance_sampling_level": "sequence"}, LESSONS),
    ({"entropy_coef": 0.1, "loss_type": "dr_grpo"}, LESSONS),
    ({"top_entropy_quantile": 0.5}, LESSONS),
    ({"entropy_coef": 0.1, "use_adaptive_entropy": True}, ()),
    ({"off_policy_mask_threshold": 0.3, "delta": 3.0}, ()),
    ({"algorithm": "rft", "meta_experience": True}, LESSONS),
    ({"algorithm": "reinforce++", "meta_experience": True}, LESSONS),
    (TAUGHT | {"temperature": 0.7}, LESSONS),
    (TAUGHT | {"top_entropy_quantile": 0.5}, ()),
]


@pytest.mark.parametrize(("options", "lessons"), CASES)
def test_gradient_loss_and_metrics_are_those_of_the_whole(
    tmp_path: Path, options: dict[str, Any], lessons: tuple[Lesson, ...]
) -> None:
    inputs = with_lessons(micro_batch(), lessons)
    if "internalisation" in options:
        inputs = with_teachers(inputs)
    if options.get("algorithm") == "rft":
        inputs = {k: v for k, v in inputs.items() if k != "old_per_token_logps"}
    options = {"grad_norm_every": 1, **options}
    plain, expected, loss, sizes = taken(tmp_path, None, inputs, output_dir=tmp_path / "a", **options)
    assert sum(sizes) >= 40 and max(sizes) > 20
    split, grads, part_loss, parts = taken(tmp_path, 20, inputs, output_dir=tmp_path / "b", **options)
    longest = [len(lesson.context_ids + lesson.target_ids) for lesson in lessons]
    assert len(parts) > len(sizes) and all(size <= 20 or size in longest for size in parts)
    assert_same(grads, expected)
    assert part_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert metrics(split).keys() == metrics(plain).keys()
    for name, values in metrics(plain).items():
        assert metrics(split)[name] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), name
    assert [i.experience_id for i, _ in split.trained_lessons] == [lesson.experience_id for lesson in lessons]
    measured, of_whole = (trainer.gradient_meter.drain(lambda t: t) for trainer in (split, plain))
    assert measured.keys() == of_whole.keys() and of_whole["mel/grad_norm_policy"] > 0
    assert measured == pytest.approx(of_whole, rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 16, 30, 55, 10**6])
def test_parts_keep_to_the_budget(tmp_path: Path, tokens: int) -> None:
    """Also where a part has several blocks: their padded tokens count together."""
    lengths = [9, 11, 30, 10, 3, 4, 29, 55, 8]
    rows = [Row(torch.arange(n), 2, 1.0 if n % 2 else 0.7) for n in lengths]
    parts = deal(rows, tokens)
    assert sorted(i for part in parts for i in part) == list(range(len(rows)))
    together = []
    for part in parts:
        blocks = pack([rows[i] for i in part], pad_id=0, max_tokens=tokens).blocks
        area = sum(block.input_ids_BT.numel() for block in blocks)
        together += [tuple(block.input_ids_BT.shape) for block in blocks]
        assert area <= tokens or (len(part) == 1 and area == area_tokens(rows, part))
    assert together == [tuple(b.input_ids_BT.shape) for b in pack(rows, pad_id=0, max_tokens=tokens).blocks]
    for part, following in pairwise(parts):
        blocks = pack([rows[i] for i in part + following], pad_id=0, max_tokens=tokens).blocks
        assert sum(block.input_ids_BT.numel() for block in blocks) > tokens, "two parts that were one under the budget"


@pytest.mark.slow
def test_a_run_under_a_budget_makes_the_same_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 8,
                               "gradient_accumulation_steps": 2, "grad_norm_every": 1}  # fmt: skip
    whole = build(tmp_path, output_dir=tmp_path / "whole", **options)
    whole.train()
    trainer = build(tmp_path, max_micro_batch_tokens=300, **options)
    seen = watch(trainer)
    trainer.train()
    lesson_tokens = {n for n in seen if n > 300}
    assert len(seen) > 8 and len(lesson_tokens) < 4
    expected, got = trainable(whole), trainable(trainer)
    for name, weight in expected.items():
        assert (got[name] - weight).norm() <= 1e-5 * max(1.0, float(weight.norm())), name
    assert_learned(trainer)
    for cut, line in zip(step_log(tmp_path / "run"), step_log(tmp_path / "whole"), strict=True):
        assert cut.keys() == line.keys()
        for key, value in line.items():
            assert cut[key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key


IDLE = (0, 3)
"""Rows of `micro_batch` that get advantage 0."""


@pytest.mark.parametrize("tokens", [None, 20])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_rows_without_advantage_are_left_out_with_the_same_gradient(
    tmp_path: Path, loss_type: str, tokens: int | None
) -> None:
    inputs = with_lessons(micro_batch(), LESSONS)
    inputs["advantages"][list(IDLE)] = 0.0
    options: dict[str, Any] = {"loss_type": loss_type, "grad_norm_every": 1}
    plain, expected, loss, _ = taken(tmp_path, None, inputs, output_dir=tmp_path / "a", **options)
    trainer = build(
        tmp_path, output_dir=tmp_path / "b", max_micro_batch_tokens=tokens, skip_zero_advantage=True, **options
    )
    set_lora(trainer.model, 0.2)
    trainer.current_gradient_accumulation_steps = 2
    seen = watch(trainer)
    trainer.model.train()
    found = trainer.compute_loss(trainer.model, inputs)
    assert_same({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}, expected)
    assert found.item() == pytest.approx(loss, rel=1e-5, abs=1e-7)
    kept = [i for i in range(4) if i not in IDLE]
    rollout_tokens = sum(int(inputs["prompt_mask"][i].sum() + inputs["completion_mask"][i].sum()) for i in kept)
    assert rollout_tokens <= sum(seen) - LESSON_TOKENS <= rollout_tokens + 5, "the others did not go through the model"
    assert [i.experience_id for i, _ in trainer.trained_lessons] == [1, 2]

    names = ("completion_mask", "completion_ids", "prompt_ids", "prompt_mask", "advantages", "old_per_token_logps")
    alone = {name: inputs[name][kept] for name in names} | {"num_items_in_batch": inputs["num_items_in_batch"]}
    other, _, _, _ = taken(tmp_path, None, alone, output_dir=tmp_path / "c", **options)
    assert metrics(trainer).keys() == metrics(plain).keys()
    for name, values in metrics(other).items():
        if name == "vespo/phi_seq_mean":  # of sequences, all of which count
            values = [(values[0] + 1.0) / 2]
        reference = metrics(plain)[name] if "loss" in name else values
        assert metrics(trainer)[name] == pytest.approx(reference, rel=1e-4, abs=1e-6, nan_ok=True), name


def grouped(inputs: dict[str, Any]) -> dict[str, Any]:
    """The micro-batch as two prompts with two completions each."""
    for name in ("prompt_ids", "prompt_mask"):
        inputs[name] = inputs[name][[1, 1, 2, 2]]
    return inputs


@pytest.mark.parametrize("tokens", [None, 20])
@pytest.mark.parametrize(
    "options", [*({"loss_type": each} for each in LOSS_TYPES), {"beta": 0.1}, {"entropy_coef": 0.1}]
)
def test_completions_that_share_their_prompt_have_the_same_gradient(
    tmp_path: Path, options: dict[str, Any], tokens: int | None
) -> None:
    inputs = with_lessons(grouped(micro_batch()), LESSONS)
    plain, expected, loss, padded = taken(tmp_path, None, inputs, output_dir=tmp_path / "a", **options)
    trainer, got, found, seen = taken(
        tmp_path, tokens, inputs, output_dir=tmp_path / "b", share_prompts=True, **options
    )
    assert_same(got, expected)
    assert found == pytest.approx(loss, rel=1e-5, abs=1e-7)
    for name, values in metrics(plain).items():
        assert metrics(trainer)[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    own = int(inputs["completion_mask"].sum()) - 4
    assert tokens is not None or sum(seen) == 5 + 4 + own + LESSON_TOKENS - 2 < sum(padded)


def test_savings_are_on_where_they_are_exact(tmp_path: Path) -> None:
    def on(**options: Any) -> tuple[bool, bool, bool]:
        savings = by_default(tmp_path, **options).savings
        return savings.skips_zero_advantage, savings.shares_prompts, savings.samples_in_buckets

    assert on() == (True, True, True)
    assert on(beta=0.1) == (False, True, True)
    assert on(top_entropy_quantile=0.5) == (False, True, True)
    assert on(**PADDED) == (False, False, False)


def test_a_resumed_run_keeps_the_savings_it_began_with(tmp_path: Path) -> None:
    trainer = by_default(tmp_path)
    state = trainer.savings.state_dict()
    names = "skip_zero_advantage", "share_prompts", "merge_to_sample", "sample_in_buckets"
    assert state == {"savings": dict.fromkeys(names, True)}
    trainer.savings.load_state_dict(state)
    assert trainer.savings.samples_in_buckets
    assert trainer.savings.shares_prompts and trainer.savings.skips_zero_advantage and trainer.savings.merges_to_sample
    trainer.savings.load_state_dict({})  # a run of an older release
    assert not trainer.savings.shares_prompts and not trainer.savings.skips_zero_advantage
    assert not trainer.savings.merges_to_sample and not trainer.savings.samples_in_buckets
    asked = build_trainer(tmp_path, share_prompts=True)
    asked.savings.load_state_dict({})
    assert asked.savings.shares_prompts, "an option that is set wins"


def test_prompts_that_cannot_be_shared_exactly_are_refused(tmp_path: Path) -> None:
    build_trainer(tmp_path)
    with pytest.raises(ConfigError, match="share_prompts=True with dropout: .* Set the dropout to 0"):
        build_trainer(tmp_path, share_prompts=True, model=_changed(tmp_path, attention_dropout=0.1))
    with pytest.raises(ConfigError, match="share_prompts=True with attn_implementation='eager'"):
        build_trainer(tmp_path, share_prompts=True, model=_changed(tmp_path, attn_implementation="eager"))
    assert not build_trainer(tmp_path, model=_changed(tmp_path, attn_implementation="eager")).savings.shares_prompts


def test_an_adapter_that_cannot_be_merged_exactly_is_refused(tmp_path: Path) -> None:
    assert build_trainer(tmp_path, merge_to_sample=True).savings.merges_to_sample
    assert not build_trainer(tmp_path, merge_to_sample=False).savings.merges_to_sample
    halved = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="merge_to_sample=True with weights that are not float32 on a CPU"):
        build_trainer(tmp_path, merge_to_sample=True, model=halved)


def _changed(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, **options)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(), None),
        (Qwen3Config(), None),
        (Qwen3Config(use_sliding_window=True, max_window_layers=1), "sliding_attention"),
        (MistralConfig(sliding_window=64), "a sliding window of 64 tokens"),
        (LlamaConfig(attention_dropout=0.1), "dropout"),
    ],
)
def test_models_whose_attention_cannot_share_prompts_are_known_by_config(config: Any, reason: str | None) -> None:
    found = why_not_shared_by(config, dropout=0.0)
    assert found is None if reason is None else reason in str(found)
    assert "dropout" in str(why_not_shared_by(LlamaConfig(), dropout=0.1))


def test_a_model_that_computes_something_else_is_found_on_a_few_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_shared", lambda q, k, v, *_: v.repeat(1, 2, 1, 1).transpose(1, 2))
    with pytest.raises(ConfigError, match="log-probs differ by .* nats from those of padded rows"):
        build_trainer(tmp_path, share_prompts=True)
    assert not build_trainer(tmp_path).savings.shares_prompts


def test_a_run_that_shares_prompts_and_skips_idle_rows_makes_the_same_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 3, "num_generations": 2}
    whole = build(tmp_path, output_dir=tmp_path / "whole", **options)
    whole.train()
    trainer = by_default(tmp_path, **options)
    assert trainer.savings.shares_prompts and trainer.savings.skips_zero_advantage
    trainer.train()
    expected, got = trainable(whole), trainable(trainer)
    for name, weight in expected.items():
        assert (got[name] - weight).norm() <= 1e-5 * max(1.0, float(weight.norm())), name
    assert_learned(trainer)


def test_a_run_without_idle_rows_makes_the_same_steps(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 3, "num_generations": 2}
    whole = build(tmp_path, output_dir=tmp_path / "whole", **options)
    whole.train()
    trainer = build(tmp_path, skip_zero_advantage=True, **options)
    trainer.train()
    expected, got = trainable(whole), trainable(trainer)
    for name, weight in expected.items():
        assert (got[name] - weight).norm() <= 1e-5 * max(1.0, float(weight.norm())), name
    assert_learned(trainer)
    lines = step_log(tmp_path / "whole")
    assert any(0 < line["mel/mixed_groups"] < line["mel/groups"] for line in lines), "no step with an unmixed group"
    assert [line["grad_norm"] for line in step_log(tmp_path / "run")] == pytest.approx(
        [line["grad_norm"] for line in lines], rel=1e-4
    )


def test_nothing_but_idle_rows_is_a_step_without_gradient(tmp_path: Path) -> None:
    inputs = micro_batch()
    inputs["advantages"][:] = 0.0
    trainer = build(tmp_path, skip_zero_advantage=True)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    seen = watch(trainer)
    assert trainer.compute_loss(trainer.model, inputs).item() == 0.0
    assert len(seen) == 1 and metrics(trainer)["entropy"][0] > 0
    assert all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("option", [{"beta": 0.1}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}])
def test_rows_with_another_gradient_are_not_left_out(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"skip_zero_advantage=True with {next(iter(option))}"):
        build(tmp_path, skip_zero_advantage=True, **option)


def test_a_process_with_fewer_parts_takes_idle_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, micro_batch()).item()
    expected = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert any(grad.any() for grad in expected.values())
    trainer.model.zero_grad()

    passes: list[int] = []
    trainer.model.get_base_model().model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr(trainer.sharding, "fsdp", True)
    monkeypatch.setattr(trainer.sharding, "most", lambda count: count + 2)
    assert trainer.compute_loss(trainer.model, micro_batch()).item() == pytest.approx(loss, abs=1e-6)
    blocks = len(passes) - 2
    assert blocks >= 1 and passes[-2:] == [min(passes[-2:])] * 2 and passes[-1] < min(passes[:blocks])
    for name, grad in expected.items():
        assert torch.allclose(trainer.model.get_parameter(name).grad, grad, atol=1e-6), name


def test_deepspeed_gets_the_last_part_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, micro_batch()).grad_fn is None, "otherwise it is over by then"
    trainer.model.zero_grad()
    monkeypatch.setattr(trainer.sharding, "deepspeed", True)
    assert trainer.compute_loss(trainer.model, micro_batch()).grad_fn is not None
    assert all(p.grad is None for p in trainer.model.parameters())


def test_budgets_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_micro_batch_tokens=0 must be positive"):
        build(tmp_path, max_micro_batch_tokens=0)
