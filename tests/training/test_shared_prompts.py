"""Completions that share the tokens of their prompt: the values and gradients of padded rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mel_lite.models.attention import SHARING_NAME, let_prompts_be_shared
from mel_lite.training.batches.packing import Row, Teacher, pack
from mel_lite.training.batches.shared_prompts import deal_shared, pack_shared
from mel_lite.training.scoring import RowScores, install_scoring_head, score
from tiny_models import tiny_config


def family(prompt: int, completions: Sequence[int], *, seed: int, temperature: float = 1.0) -> list[Row]:
    """Rows of random ids with one prompt."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> torch.Tensor:
        return torch.randint(4, 320, (n,), generator=generator)

    shared = ids(prompt)
    return [Row(torch.cat([shared, ids(n)]), n, temperature) for n in completions]


def rows() -> list[Row]:
    """Groups of ragged completions in no order, one of them alone, one of one token, at two temperatures."""
    groups = [
        family(7, (9, 1, 14, 9), seed=1),
        family(12, (3, 17), seed=2, temperature=0.7),
        family(5, (6,), seed=3),
        family(1, (4, 4, 2), seed=4),
    ]
    return [row for column in itertools.zip_longest(*groups) for row in column if row is not None]


def model_of(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    assert let_prompts_be_shared(model) and model.config._attn_implementation == SHARING_NAME
    install_scoring_head(model)
    model.get_output_embeddings().weight.requires_grad_(False)
    return model.train()


def taken(model: Any, packed: Any, **options: Any) -> tuple[RowScores, dict[str, torch.Tensor]]:
    """Scores, and the gradient of a weighted sum of all log-probs and divergences."""
    model.zero_grad()
    scores = score(model, packed, **options)
    weights = [torch.cos(torch.arange(len(logp), dtype=torch.float32) + i) for i, logp in enumerate(scores.logps)]
    loss = sum((w * logp).sum() for w, logp in zip(weights, scores.logps, strict=True))
    if scores.kls is not None:
        loss = loss + sum(kl.sum() for kl in scores.kls)
    loss.backward()
    return scores, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys() and expected
    for name, grad in expected.items():
        assert grad.norm() > 0 and (got[name] - grad).norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_shared_prompts_give_the_scores_and_the_gradient_of_padded_rows(kind: str, max_tokens: int | None) -> None:
    model, each = model_of(kind), rows()
    expected, gradient = taken(model, pack(each, pad_id=0))
    packed = pack_shared(each, max_tokens=max_tokens)
    assert (len(packed.blocks) > 2) == (max_tokens is not None), "two temperatures are two blocks"
    got, shared_gradient = taken(model, packed)
    assert_same(shared_gradient, gradient)
    for name in ("logps", "entropies"):
        for ours, theirs in zip(getattr(got, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["checkpointing", "recompute"])
def test_activations_may_be_computed_again_in_the_backward(how: str) -> None:
    model, each = model_of("llama"), rows()
    _, gradient = taken(model, pack(each, pad_id=0))
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _, got = taken(model, pack_shared(each, max_tokens=40), recompute=how == "recompute")
    assert_same(got, gradient)


def test_divergences_from_teachers_are_taken_at_the_same_tokens() -> None:
    model, each = model_of("llama"), rows()
    for i in (0, 3, 4):
        position_K = torch.arange(0, each[i].scored_tokens, 2)
        hidden_KH = torch.randn(len(position_K), 64, generator=torch.Generator().manual_seed(i))
        each[i] = Row(each[i].ids, each[i].scored_tokens, each[i].temperature, teacher=Teacher(position_K, hidden_KH))
    expected, gradient = taken(model, pack(each, pad_id=0))
    got, shared_gradient = taken(model, pack_shared(each))
    assert_same(shared_gradient, gradient)
    assert got.kls is not None and expected.kls is not None
    for ours, theirs in zip(got.kls, expected.kls, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_prompt_is_computed_once_and_nothing_is_padded() -> None:
    each = [*family(30, (10, 20, 5, 5), seed=1), *family(8, (3,), seed=2)]
    (block,) = pack_shared(each).blocks
    assert block.input_ids_BT.shape == (1, 30 + (9 + 19 + 4 + 4) + 8 + 2)
    for row in each:  # each row is in the sequence, at its own positions
        places = [t for t in range(block.input_ids_BT.shape[1]) if block.position_ids_BT[0, t] < len(row.ids) - 1]
        assert set(row.ids[:-1].tolist()) <= set(block.input_ids_BT[0, places].tolist())


@pytest.mark.parametrize("max_tokens", [1, 20, 33, 60, None])
def test_parts_hold_every_row_once_and_keep_the_limit(max_tokens: int | None) -> None:
    each = rows()
    parts = deal_shared(each, max_tokens)
    assert sorted(i for part in parts for i in part) == list(range(len(each)))
    for part in parts:
        blocks = pack_shared([each[i] for i in part]).blocks
        tokens = sum(block.input_ids_BT.shape[1] for block in blocks)
        assert max_tokens is None or tokens <= max_tokens or len(part) == 1
    if max_tokens is None:
        assert len(parts) == 1


def test_rows_with_nothing_scored_are_left_out_but_for_the_last_one() -> None:
    silent = Row(torch.arange(4, 14), 0)
    each = [silent, *family(5, (3, 4), seed=1), silent]
    packed = pack_shared(each)
    assert packed.order == (2, 1) and len(packed.unpack(torch.zeros(7))[0]) == 0
    model = model_of("llama")
    alone = score(model, pack_shared([silent, silent]))
    assert [len(logp) for logp in alone.logps] == [0, 0]
    with pytest.raises(AssertionError):
        pack_shared([Row(torch.tensor([4, 5]), 2)])
