"""Transformers engine: a sequence depends only on prompt and seed, and reported log-probs equal the trainer's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import FalconH1Config

from mel_lite.engines import buckets, decode, hf
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import EngineError
from mel_lite.models.load import ModelSpec, load_base
from mel_lite.training.batches.packing import Row, pack
from mel_lite.training.scoring import score
from mel_lite.types import Finish
from tiny_models import save_tiny

EOS, PAD = 2, 0


def _requests(*seeds: int) -> list[Request]:
    return [Request(tuple(range(10, 14 + seed % 5)), seed) for seed in seeds]


def test_a_sequence_depends_on_prompt_and_seed_alone(model: Any) -> None:
    requests, sampling = _requests(*range(12)), Sampling(12, temperature=0.7)
    together = HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate(requests, sampling)
    torch.manual_seed(123)
    by_three = HFEngine(model, eos_ids=[EOS], pad_id=PAD, max_concurrent=3).generate(requests[::-1], sampling)[::-1]
    assert [c.ids for c in together] == [c.ids for c in by_three]
    assert len({c.ids for c in together}) > 6, "different seeds must give different sequences"


def test_completions_of_one_prompt_share_its_prefill(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(tuple(range(10, 10 + 3 * (seed % 3) + 1)), seed) for seed in range(12)]
    sampling = Sampling(12, temperature=0.7)
    forwards = []
    watch = model.get_base_model().model.register_forward_pre_hook(
        lambda _module, _args, kwargs: forwards.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    engine = HFEngine(model, eos_ids=[EOS], pad_id=PAD, buckets=lambda: False)
    shared = engine.generate(requests, sampling)
    watch.remove()
    assert forwards[0] == (3, 6), "three prompts once each, without their last token"
    assert forwards[1] == (12, 1) and {tokens for _, tokens in forwards[1:]} == {1}
    monkeypatch.setattr(hf, "_prefill", lambda *_: None)
    alone = engine.generate(requests, sampling)
    assert [c.ids for c in shared] == [c.ids for c in alone]
    for a, b in zip(shared, alone, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("in_buckets", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_finished_sequences_leave_the_batch_and_change_no_token(
    model: Any, monkeypatch: pytest.MonkeyPatch, penalty: float, in_buckets: bool
) -> None:
    """Ends are common tokens here, so that sequences stop at many lengths; room is so short that buffers grow."""
    monkeypatch.setattr(decode, "ROOM_TOKENS", 3)
    monkeypatch.setattr(buckets, "ROOM_TOKENS", 3)
    assert buckets.why_not_bucketed(model.get_base_model()) is None
    monkeypatch.setattr(hf, "why_not_bucketed", lambda _: None)  # its forwards would be counted
    requests = [Request(tuple(range(10, 12 + 2 * (seed % 2))), seed) for seed in range(16)]
    sampling, ends = Sampling(20, temperature=1.5, repetition_penalty=penalty), list(range(2, 60))
    rows: list[int] = []
    watch = model.get_base_model().model.register_forward_pre_hook(
        lambda _module, _args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    left = HFEngine(model, eos_ids=ends, pad_id=PAD, buckets=lambda: in_buckets).generate(requests, sampling)
    watch.remove()
    monkeypatch.setattr(hf, "_prefill", lambda *_: None)
    stayed = HFEngine(model, eos_ids=ends, pad_id=PAD, buckets=lambda: False).generate(requests, sampling)
    assert [(c.ids, c.finish) for c in left] == [(c.ids, c.finish) for c in stayed]
    for a, b in zip(left, stayed, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)
    lengths = [len(c.ids) for c in left]
    assert len(set(lengths)) > 4 and rows[1] == 16 and len(rows) == 1 + max(lengths)
    for position, count in enumerate(rows[1:]):
        still = sum(length > position for length in lengths)
        assert still <= count and decode.LEAVE_SHARE * (count - still) < count


def test_a_watcher_sees_how_far_sampling_is(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    engine = HFEngine(model, eos_ids=list(range(2, 60)), pad_id=PAD, max_concurrent=8)
    engine.watch = lambda done, tokens: seen.append((done, tokens))
    completions = engine.generate(_requests(*range(16)), Sampling(20, temperature=1.5))
    done = [each for each, _ in seen]
    assert done == sorted(done) and (8, 0) in seen and seen[-1] == (16, 0)
    first = seen[: seen.index((8, 0))]
    assert [tokens for _, tokens in first] == list(range(1, len(first) + 1))
    assert len(first) in {len(c.ids) for c in completions}, "the tokens of its longest sequence"
    assert {0, 8} < set(done) and max(done[: len(first)]) < 8, "some had finished while others were sampled"


def test_a_cache_with_other_states_than_keys_and_values_is_not_shared() -> None:
    """Selecting rows of such a cache would not select its recurrent states."""
    made = FalconH1Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=8,
    )  # fmt: skip
    ids_UP = torch.ones(2, 5, dtype=torch.long)
    assert hf._prefill(SimpleNamespace(config=made), ids_UP, ids_UP, torch.tensor([0, 0, 1])) is None


def test_a_bound_on_the_cache_splits_batches_and_changes_no_token(model: Any) -> None:
    requests, sampling = _requests(*range(12)), Sampling(12, temperature=0.7)
    sizes = []

    class Watched(HFEngine):
        def _generate_batch(self, model: Any, rows: Any, sampling: Any) -> Any:
            sizes.append((len(rows), max(len(r.prompt_ids) for r in rows)))
            return super()._generate_batch(model, rows, sampling)

    bounded = Watched(model, eos_ids=[EOS], pad_id=PAD, max_cache_tokens=60).generate(requests, sampling)
    assert [c.ids for c in bounded] == [
        c.ids for c in HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate(requests, sampling)
    ]
    assert all(rows * (prompt + 12) <= 60 for rows, prompt in sizes) and max(rows for rows, _ in sizes) == 3
    sizes.clear()
    Watched(model, eos_ids=[EOS], pad_id=PAD, max_cache_tokens=5).generate(requests[:3], sampling)
    assert [rows for rows, _ in sizes] == [1, 1, 1], "one sequence is always sampled"


def test_reported_log_probs_are_those_the_trainer_scores(model: Any) -> None:
    requests = _requests(3, 4, 5, 6)
    completions = HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate(requests, Sampling(10, temperature=0.7))
    both = zip(requests, completions, strict=True)
    rows = [Row(torch.tensor(r.prompt_ids + c.ids), len(c.ids), temperature=0.7) for r, c in both]
    with torch.no_grad():
        logps, *_ = score(model, pack(rows, pad_id=PAD))
    for completion, logp_T in zip(completions, logps, strict=True):
        assert torch.allclose(torch.tensor(completion.logprobs), logp_T, atol=1e-4)
        assert min(completion.logprobs) < -0.1


@pytest.mark.parametrize("packs", [False, True])
def test_tokens_are_drawn_with_the_models_probabilities(
    model: Any, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    monkeypatch.setattr(hf, "WORTH_TOKENS", 1)
    prompt = (20, 21, 22)
    with torch.no_grad():
        probs_V = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 1.5, dim=-1)
    draws = 4000
    engine = HFEngine(model, eos_ids=[EOS], pad_id=PAD, max_concurrent=1000, merges_adapter=lambda: packs)
    completions = engine.generate([Request(prompt, seed) for seed in range(draws)], Sampling(1, temperature=1.5))
    counts = Counter(c.ids[0] for c in completions)
    for token, p in sorted(enumerate(probs_V.tolist()), key=lambda item: -item[1])[:8]:
        assert abs(counts[token] / draws - p) < 4 * (p * (1 - p) / draws) ** 0.5 + 1e-9, token


def test_greedy_is_transformers_greedy(model: Any) -> None:
    prompt = (30, 31, 32, 33)
    ours = HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate([Request(prompt, 1)], Sampling(8, temperature=0))[0]
    ids = torch.tensor([prompt])
    theirs = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=EOS
    )
    assert list(ours.ids) == theirs[0, 4:].tolist()


def test_top_k_and_top_p_cut_the_distribution(model: Any) -> None:
    prompt = (40, 41)
    with torch.no_grad():
        order = model(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
    engine = HFEngine(model, eos_ids=[EOS], pad_id=PAD)
    requests = [Request(prompt, seed) for seed in range(200)]
    three = engine.generate(requests, Sampling(1, temperature=3.0, top_k=3))
    assert {c.ids[0] for c in three} == set(order[:3])
    one = engine.generate(requests, Sampling(1, temperature=3.0, top_p=1e-6))
    assert {c.ids[0] for c in one} == {order[0]} and one[0].logprobs[0] == pytest.approx(0.0, abs=1e-6)


def test_an_end_token_ends_the_completion(model: Any) -> None:
    sampled = HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate(_requests(*range(8)), Sampling(30))
    common = Counter(token for c in sampled for token in c.ids[1:]).most_common(1)[0][0]
    for completion in HFEngine(model, eos_ids=[common], pad_id=PAD).generate(_requests(*range(8)), Sampling(30)):
        assert len(completion.ids) == len(completion.logprobs)
        assert completion.ids.count(common) == (completion.finish is Finish.STOP)
        assert completion.ids[-1] == common or (completion.finish is Finish.LENGTH and len(completion.ids) == 30)


def test_out_of_memory_lowers_concurrency_and_changes_no_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, sampling = _requests(*range(9)), Sampling(6)
    expected = HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate(requests, sampling)
    original, sizes = hf.decode, []

    def scarce(model: Any, cache: Any, ids_BP: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(ids_BP))
        if len(ids_BP) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, cache, ids_BP, *arguments, **options)

    monkeypatch.setattr(hf, "decode", scarce)
    split = HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate(requests, sampling)
    assert [c.ids for c in split] == [c.ids for c in expected]
    assert max(sizes) == 9 and sum(size for size in sizes if size <= 2) == 9

    monkeypatch.setattr(hf, "decode", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    with pytest.raises(EngineError, match="one sequence of 4 prompt"):
        HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate(_requests(0), sampling)


def test_training_mode_and_generation_defaults_are_restored(model: Any, tmp_path: Path) -> None:
    model.train()
    before = model.generation_config, model.get_base_model().generation_config
    HFEngine(model, eos_ids=[EOS], pad_id=PAD).generate(_requests(1), Sampling(3))
    assert model.training
    assert (model.generation_config, model.get_base_model().generation_config) == before


def test_sampling_continues_past_the_end_if_requested(tmp_path: Path) -> None:
    model = load_base(ModelSpec(str(save_tiny(tmp_path / "base"))))
    requests = [Request((5, 6, 7), seed) for seed in range(3)]
    every_id_ends = HFEngine(model, eos_ids=list(range(320)), pad_id=0)
    assert [len(c.ids) for c in every_id_ends.generate(requests, Sampling(9))] == [1, 1, 1]
    done = every_id_ends.generate(requests, Sampling(9, ignore_eos=True))
    assert [(len(c.ids), len(c.logprobs), c.finish) for c in done] == [(9, 9, Finish.LENGTH)] * 3


def test_lower_concurrency_samples_the_same(tmp_path: Path) -> None:
    model = load_base(ModelSpec(str(save_tiny(tmp_path / "base"))))
    engine, sizes = HFEngine(model, eos_ids=[2], pad_id=0), []
    batch = engine._generate_batch
    engine._generate_batch = lambda m, rows, s: sizes.append(len(rows)) or batch(m, rows, s)  # type: ignore[method-assign]
    requests = [Request((5, 6, 7), seed) for seed in range(6)]
    expected = engine.generate(requests, Sampling(8))
    assert engine.limit_cache(4 * 11)
    assert engine.limit_cache(5 * 11)  # lowered, never raised
    assert [c.ids for c in engine.generate(requests, Sampling(8))] == [c.ids for c in expected]
    assert sizes == [6, 4, 2]
