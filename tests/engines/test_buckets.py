"""Sampling without padding: the tokens of padded sampling, common beginnings computed once, and where it is off."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from mel_lite.engines import buckets, hf
from mel_lite.engines.base import Completion, Request, Sampling
from mel_lite.engines.buckets import families, prefill_buckets, why_not_bucketed
from mel_lite.engines.hf import HFEngine
from mel_lite.models.attention import NAME, SHARING_NAME, register, sharing_prompts
from tiny_models import tiny_config

STEM = tuple(range(10, 90))


def model_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = tiny_config(kind.removeprefix("sliding "))
    if kind.startswith("sliding"):
        config.layer_types, config.sliding_window = ["full_attention", "sliding_attention"], 8
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0 if weight.ndim > 1 else 1.0)
    return model


def requests() -> list[Request]:
    """Short prompts with several completions, long ones that begin alike, one that is the beginning, and single ids."""
    draw = random.Random(3)
    prompts = [(7, 8, 9), (7, 8, 9), (7, 8), (5,), STEM, (*STEM, 4), (*STEM, 6, 5, 4), (*STEM[:70], 3)]
    prompts += [tuple(draw.choices(range(4, 320), k=k)) for k in (30, 31, 45, 300)]
    draw.shuffle(prompts)
    return [Request(prompt, seed) for seed, prompt in enumerate(prompts * 2)]


def same(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [(each.ids, each.finish) for each in ours] == [(each.ids, each.finish) for each in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len({each.ids for each in ours}) > len(ours) // 2 and len({len(each.ids) for each in ours}) > 4


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("qwen3", "sdpa"), ("qwen3", NAME)])
def test_tokens_are_those_of_padded_sampling(kind: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    model, sampling = model_of(kind, attn_implementation=attention), Sampling(40, temperature=1.5)
    made: list[Any] = []
    monkeypatch.setattr(hf, "prefill_buckets", lambda *a: made.append(prefill_buckets(*a)) or made[-1])
    ends = list(range(2, 20))
    padded = HFEngine(model, eos_ids=ends, pad_id=0, buckets=lambda: False).generate(requests(), sampling)
    assert not made
    same(HFEngine(model, eos_ids=ends, pad_id=0).generate(requests(), sampling), padded)
    assert len(made) == 1 and model.config._attn_implementation == attention
    by_five = HFEngine(model, eos_ids=ends, pad_id=0, max_concurrent=5).generate(requests(), sampling)
    same(by_five, padded)


def test_a_short_sequence_is_not_as_wide_as_the_longest() -> None:
    model = model_of("llama")
    prompts = sorted((each.prompt_ids for each in requests()), key=lambda ids: -len(ids))
    with torch.no_grad(), sharing_prompts(model):
        cache = prefill_buckets(model, prompts)
    stored = sum(bucket.rows * bucket.stored_tokens for bucket in cache.buckets)
    exact = sum(len(prompt) - 1 for prompt in prompts)
    assert exact < stored < 1.2 * exact < 0.3 * len(prompts) * len(prompts[0])
    cache.batch_select_indices(torch.tensor([0, len(prompts) - 1]))
    assert [(bucket.rows, bucket.stored_tokens) for bucket in cache.buckets] == [
        (1, 299),
        (1, cache.buckets[-1].stored_tokens),
    ]


def test_a_common_beginning_is_computed_once() -> None:
    model, tokens = model_of("llama"), []
    model.model.register_forward_pre_hook(
        lambda _m, _a, options: tokens.append(options["input_ids"].numel()), with_kwargs=True
    )
    prompts = [(*STEM, 4, 5, 6), (*STEM, 4, 7), (*STEM, 4, 7), (3, 4, 5)]
    with torch.no_grad(), sharing_prompts(model):
        prefill_buckets(model, prompts)
        assert tokens.pop() == 81 + 1 + 2, "the second of the longer prompts is the beginning itself"
        prefill_buckets(model, prompts, least=82)
        assert tokens.pop() == 82 + 81 + 2
        prefill_buckets(model, [(1, 2, 3), (1, 2, 4)])
        assert tokens.pop() == 2, "equal but for the token that is not stored"


def saved(parts: list[tuple[int, list[tuple[int, ...]]]]) -> int:
    return sum(shared * (len(family) - 1) for shared, family in parts)


@settings(max_examples=60)
@given(st.sets(st.lists(st.integers(0, 1), max_size=6).map(tuple), min_size=1, max_size=6), st.integers(1, 4))
def test_no_split_saves_more_tokens(stems: set[tuple[int, ...]], least: int) -> None:
    parts = families(sorted(stems, reverse=True), least)
    assert sorted(stem for _, family in parts for stem in family) == sorted(stems)
    for shared, family in parts:
        assert len({stem[:shared] for stem in family}) == 1 and len(family[0][:shared]) == shared
        assert shared * (len(family) - 1) >= least if shared else len(family) == 1

    def common(family: tuple[tuple[int, ...], ...]) -> int:
        return next(n for n in range(len(family[0]), -1, -1) if len({each[:n] for each in family}) == 1)

    ordered = sorted(stems)
    for cuts in itertools.product([0, 1], repeat=len(ordered) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(ordered)]
        each = [tuple(ordered[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        worth = [n for family in each if (n := common(family) * (len(family) - 1)) >= least]
        assert saved(parts) >= sum(worth)


def test_questions_with_several_analyses_are_families() -> None:
    one, two = (1, *range(20, 60)), (1, *range(60, 90))
    stems = [(*one, 3), (*two, 3), (*one, 4, 4), (2, 2), (*two, 5)]
    assert families(stems, 20) == [(41, [(*one, 3), (*one, 4, 4)]), (31, [(*two, 3), (*two, 5)]), (0, [(2, 2)])]
    assert families(stems, 40) == [(41, [(*one, 3), (*one, 4, 4)]), (0, [(*two, 3)]), (0, [(*two, 5)]), (0, [(2, 2)])]


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("llama", {"attn_implementation": "eager"}, "attn_implementation='eager'"),
        ("sliding qwen3", {}, "sliding_attention"),
    ],
)
def test_other_attentions_are_sampled_with_padding(kind: str, options: dict[str, str], reason: str) -> None:
    model, sampling = model_of(kind, **options), Sampling(8, temperature=1.5)
    assert reason in str(why_not_bucketed(model))
    padded = HFEngine(model, eos_ids=[2], pad_id=0, buckets=lambda: False).generate(requests(), sampling)
    asked = HFEngine(model, eos_ids=[2], pad_id=0, buckets=lambda: True).generate(requests(), sampling)
    assert asked == padded


def test_a_model_that_computes_something_else_is_found_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    assert why_not_bucketed(model) is None
    attend = buckets.BucketedCache.attend
    monkeypatch.setattr(buckets.BucketedCache, "attend", lambda self, layer, *a: attend(self, layer, *a[:-1], 0.2))
    assert "log-probs differ by" in str(why_not_bucketed(model))
    monkeypatch.setattr(buckets.BucketedCache, "attend", lambda *a: attend(*a) * torch.nan)
    assert "log-probs differ by nan" in str(why_not_bucketed(model))
    monkeypatch.undo()
    model.model.layers[0].self_attn.layer_idx = None
    assert "its attention takes no cache of ours" in str(why_not_bucketed(model))
    assert model.config._attn_implementation == "sdpa" != SHARING_NAME
