"""vLLM's share of a GPU: formulas compared with published measurements, and plans that use them."""

from __future__ import annotations

from typing import Any

import pytest

from mel_lite.engines.choice import EngineChoice
from mel_lite.memory import formulas
from mel_lite.memory import vllm as vllm_memory
from mel_lite.memory.formulas import CONTEXT_BYTES, GIB, KNOWN, Shape
from mel_lite.memory.plan import BUDGETS, TARGET_SHARE, Plan, apply, plan
from mel_lite.memory.vllm import VLLMCard
from mel_lite.memory.workload import Workload, workload
from mel_lite.recipe import Recipe, resolve

QWEN3_32B = Shape(64, 5120, 25600, 64, 8, 128, 151936, False, qk_norm=True)
H100_GIB = 79.18

PEAK_GIB = [
    # Unsloth's notes on vLLM under load (a model whose size is that of Qwen3-4B in 16 bits with slots of rank 16)
    ("Qwen/Qwen3-4B", 2048, 8, 0.18), ("Qwen/Qwen3-4B", 4096, 8, 0.32), ("Qwen/Qwen3-4B", 8192, 8, 0.62),
    ("Qwen/Qwen3-4B", 8192, 64, 0.62), ("Qwen/Qwen3-4B", 8192, 128, 0.76), ("Qwen/Qwen3-4B", 8192, 256, 1.45),
    ("Qwen/Qwen3-4B", 8192, 512, 2.83), ("Qwen/Qwen3-4B", 8192, 1024, 5.59), ("Qwen/Qwen3-4B", 8192, 2048, 11.11),
    ("Qwen/Qwen3-4B", 16384, 8, 1.20), ("Qwen/Qwen3-4B", 32768, 8, 2.38),
    # llm-d-benchmark, logs of vLLM on an H100
    ("meta-llama/Llama-3.1-8B", 8192, 1024, 4.76), ("Qwen/Qwen3-0.6B", 8192, 1024, 5.56), (None, 8192, 1024, 5.64),
]  # fmt: skip
"""(model, batched tokens, sequences, measured peak of a forward pass in GiB)."""

CACHE_GIB = [("meta-llama/Llama-3.1-8B", 14.99, 51.38), ("Qwen/Qwen3-0.6B", 1.12, 64.45), (None, 61.03, 4.45)]
"""(model, weights, cache) at gpu_memory_utilization 0.9 from the same logs, without adapters. In that version the
graphs were not part of the share."""


def shape_of(name: str | None) -> Shape:
    return QWEN3_32B if name is None else KNOWN[name]


@pytest.mark.parametrize(("name", "tokens", "sequences", "measured_gib"), PEAK_GIB)
def test_a_forward_pass_peaks_where_others_measured_it(
    name: str | None, tokens: int, sequences: int, measured_gib: float
) -> None:
    predicted = vllm_memory.pass_bytes(shape_of(name), sequences, four_bit=False, batched_tokens=tokens)
    assert predicted / GIB == pytest.approx(measured_gib, rel=0.03, abs=0.035)


@pytest.mark.parametrize(("name", "weights_gib", "cache_gib"), CACHE_GIB)
def test_the_cache_is_what_is_left_of_the_share(name: str | None, weights_gib: float, cache_gib: float) -> None:
    shape = shape_of(name)
    weights = formulas.weight_bytes(shape, four_bit=False)
    assert weights / GIB == pytest.approx(weights_gib, rel=0.01)
    one_pass = vllm_memory.pass_bytes(shape, 1024, four_bit=False, batched_tokens=8192)
    left = 0.9 * H100_GIB - (weights + one_pass + vllm_memory.LIBRARY_BYTES) / GIB
    assert left == pytest.approx(cache_gib, abs=0.06)


def test_slots_are_part_of_what_vllm_says_its_weights_take() -> None:
    """7.56 GiB in the first source; the weights alone are 7.49."""
    shape = KNOWN["Qwen/Qwen3-4B"]
    weights = formulas.weight_bytes(shape, four_bit=False)
    assert weights / GIB == pytest.approx(7.49, abs=0.005)
    assert (weights + vllm_memory.slot_bytes(shape, 16)) / GIB == pytest.approx(7.56, abs=0.01)
    assert vllm_memory.slot_bytes(shape, 9) == vllm_memory.slot_bytes(shape, 16) > vllm_memory.slot_bytes(shape, 8)


# ---- plans -----------------------------------------------------------------------------------------------------------


def planned(
    gpu: str,
    *,
    pinned: tuple[str, ...] = (),
    card_gib: float | None = None,
    free_gib: float | None = None,
    **overrides: Any,
) -> Any:
    """The recipe with the planned settings, the plan, and its workload."""
    recipe = resolve(preset=gpu, overrides=[(key.replace("__", "."), value) for key, value in overrides.items()])
    total = BUDGETS[gpu] if card_gib is None else int(card_gib * GIB)
    card = VLLMCard(total, total - CONTEXT_BYTES)
    shape, engine = formulas.known_shape(recipe.model.name), EngineChoice("unsloth", True, "test")
    assert shape is not None
    sizes: dict[str, Any] = {"budget_bytes": BUDGETS[gpu], "card": card}
    made: Plan = plan(recipe, shape, gpu=gpu, pinned=pinned, engine=engine, **sizes)
    chosen: Recipe = apply(recipe, made)
    load: Workload = workload(chosen, shape, vllm_on=card)
    return chosen, made, load


@pytest.mark.parametrize("gpu", sorted(BUDGETS))
def test_the_share_is_the_rollouts_peak_and_the_cache_is_given_back_for_the_update(gpu: str) -> None:
    recipe, made, load = planned(gpu)
    assert made.fits and made.peak_bytes <= TARGET_SHARE * BUDGETS[gpu]
    phases = {phase.name: phase for phase in made.phases}
    assert list(phases) == ["load", "rollout", "analysis", "replay", "scoring", "update", "optimizer", "export"]
    share = recipe.model.gpu_memory_utilization * BUDGETS[gpu]
    trainers = phases["rollout"].parts["LoRA"] + phases["rollout"].parts["optimizer states"]
    assert phases["rollout"].bytes == pytest.approx(CONTEXT_BYTES + share + trainers, abs=4)
    assert phases["load"].bytes == phases["rollout"].bytes - trainers
    assert phases["analysis"].bytes == phases["replay"].bytes == phases["rollout"].bytes, "fixed when it starts"
    for phase in made.phases:
        assert sum(phase.parts.values()) == phase.bytes and min(phase.parts.values()) >= 0
    for name in ("scoring", "update", "optimizer"):
        assert "vLLM's cache" not in phases[name].parts
        assert phases[name].parts["vLLM asleep"] == phases["rollout"].parts["vLLM's adapter and graphs"]
    cache = formulas.kv_cache_bytes(load.shape, load.vllm_cache_tokens)
    assert cache == pytest.approx(phases["rollout"].parts["vLLM's cache"], rel=0.001)
    assert load.vllm_cache_tokens >= 2 * load.longest_sampled
    assert recipe.model.gpu_memory_utilization <= vllm_memory.max_share(BUDGETS[gpu], BUDGETS[gpu])
    assert str(load.vllm_cache_tokens) in made.notes[0]


def test_rollouts_are_scored_where_vllm_sampled_them() -> None:
    recipe, made, load = planned("24gb")
    assert load.scores_rollouts and not workload(recipe, load.shape).scores_rollouts
    scored = load.completions * load.completion_tokens
    assert {phase.name: phase.bytes for phase in made.phases}["scoring"] > 4 * load.shape.hidden * scored


def test_no_more_than_all_sequences_can_fill() -> None:
    recipe, made, load = planned("80gb", model__name="Qwen/Qwen3-0.6B")
    assert recipe.model.gpu_memory_utilization < 0.8
    most = max(min(n, load.vllm.sequences) * (prompt + new) for n, prompt, new in load.sampled.values())
    assert most <= load.vllm_cache_tokens <= 1.02 * most
    assert made.choices["model.max_num_seqs"] == vllm_memory.MAX_NUM_SEQS == load.at_once("rollout")


def test_a_share_is_of_the_whole_card() -> None:
    """The budget of a 24 GB preset on an 80 GB card: the same bytes, a smaller share."""
    small, _, small_load = planned("24gb", model__name="Qwen/Qwen3-14B-Base")
    large, made, load = planned("24gb", card_gib=79.0, model__name="Qwen/Qwen3-14B-Base")
    assert made.fits
    assert large.model.gpu_memory_utilization * 79.0 * GIB >= small.model.gpu_memory_utilization * BUDGETS["24gb"]
    assert {phase.name: phase.bytes for phase in made.phases}["rollout"] <= BUDGETS["24gb"]
    assert load.vllm_cache_tokens >= small_load.vllm_cache_tokens


def test_a_pinned_share_is_kept_or_refused_with_one_that_fits() -> None:
    key = "model.gpu_memory_utilization"
    recipe, made, _ = planned("24gb", pinned=(key,), model__gpu_memory_utilization=0.6)
    assert made.fits and recipe.model.gpu_memory_utilization == 0.6
    chosen = planned("24gb")[0].model.gpu_memory_utilization
    _, too_much, load = planned("24gb", pinned=(key,), card_gib=24.0, model__gpu_memory_utilization=0.97)
    assert not too_much.fits and "the rollout phase needs 23.9 GiB" in too_much.refusal()
    reserved = vllm_memory.reserved_for_training_bytes(load.shape, load.vllm_context_tokens)
    assert load.share_bytes == 24 * GIB - reserved < 0.97 * 24 * GIB, "Unsloth reserves memory for training"
    _, too_little, load = planned("24gb", pinned=(key,), model__gpu_memory_utilization=0.31)
    assert not too_little.fits and too_little.peak_bytes < BUDGETS["24gb"]
    assert not any("cache holds" in note for note in too_little.notes)
    assert load.vllm_granted_tokens <= 0
    assert "holds vLLM's copy of the model but no sequence, and the longest has 6144 tokens" in too_little.refusal()
    assert too_little.advice[:2] == (f"--set {key}={chosen}", "--engine hf")
    assert too_much.advice[0].startswith(f"--set {key}=0.7") and too_much.advice[1] == "--engine hf"
    assert too_little.choices["model.max_num_seqs"] == too_much.choices["model.max_num_seqs"] == 64


def test_an_evaluations_longest_answer_must_fit_the_cache_too() -> None:
    longer = {"data__eval": "demo:test", "eval__max_new_tokens": 9000}
    assert planned("24gb", **longer)[2].longest_sampled == 1024 + 9000
    unevaluated = planned("24gb", data__eval=None, eval__max_new_tokens=9000)[2]
    assert unevaluated.longest_sampled == 5120 + 1024


@pytest.mark.parametrize("four_bit", [True, False])
@pytest.mark.parametrize("name", ["Qwen/Qwen3-1.7B", "Qwen/Qwen3-14B"])
def test_the_least_share_for_a_length_is_granted_it(name: str, four_bit: bool) -> None:
    """Unsloth's estimate, computed by hand for one model, and its inverse."""
    for tokens in (1, 256, 6144, 30_000):
        share = vllm_memory.min_share_bytes(KNOWN[name], tokens, 32, four_bit=four_bit)
        granted = vllm_memory.granted_tokens(KNOWN[name], share, 32, four_bit=four_bit)
        margin = vllm_memory.MARGIN_BYTES / formulas.kv_cache_bytes(KNOWN[name], 1)
        assert tokens <= granted < tokens + 257 + margin
        assert vllm_memory.granted_tokens(KNOWN[name], share - 2**28, 32, four_bit=four_bit) < granted
    # Qwen3-14B: 13.2e9 weights at 5/8 byte, 1.556e9 others at 2, slots of rank 32, graphs at 0.13 of at least 0.15 GiB
    if name.endswith("14B") and four_bit:
        left = 16 * GIB - (0.625 * 13_212_057_600 + 2 * 1_556_250_112 + 256_901_120 + 0.15 * GIB)
        expected = int(0.95 * left / 163_840) // 256 * 256
        assert vllm_memory.granted_tokens(KNOWN[name], 16 * GIB, 32, four_bit=True) == expected > 0


def test_what_unsloth_would_cut_is_refused() -> None:
    """The cache holds the longest sequence by vLLM's own count, but not by Unsloth's estimate."""
    options = {"model__name": "Qwen/Qwen3-14B-Base", "train__algorithm": "grpo"}
    pinned = ("model.gpu_memory_utilization",)
    _, made, load = planned("24gb", pinned=pinned, model__gpu_memory_utilization=0.52, **options)
    assert load.vllm_cache_tokens > load.longest_sampled == 3072 > load.vllm_granted_tokens
    assert not made.fits and f"accepts sequences of up to {load.vllm_granted_tokens} tokens" in made.refusal()
    _, made, load = planned("24gb", **options)
    assert made.fits and load.vllm_granted_tokens >= 3072
    _, made, _ = planned("24gb", model__max_seq_length=200_000)
    assert not made.fits and "training on sequences of 200000 tokens takes the whole card" in made.refusal()


def test_pinned_sequences_are_kept() -> None:
    recipe, made, load = planned("24gb", pinned=("model.max_num_seqs",), model__max_num_seqs=16)
    assert recipe.model.max_num_seqs == 16 == load.at_once("rollout") and made.fits
    assert load.vllm_cache_tokens == pytest.approx(16 * (1024 + 2048), abs=64), "no more than they can fill"


def test_what_fits_with_transformers_alone_is_advised() -> None:
    """vLLM keeps its slots and graphs during the update, even in sleep mode."""
    options: dict[str, Any] = {
        "model__name": "Qwen/Qwen3-8B-Base", "train__max_completion_length": 512, "train__max_context_tokens": 8000,
        "train__analysis_max_tokens": 512, "data__max_prompt_tokens": 8000, "train__grad_norm_every": 0,
    }  # fmt: skip
    _, refused, _ = planned("12gb", **options)
    assert not refused.fits and refused.advice[0] == "--engine hf"
    assert _transformers_plan("12gb", **options).fits
    assert refused.choices["train.num_generations"] == 8, "a refused plan shows the requested group size"
    _, hopeless, _ = planned("12gb", **{**options, "data__max_prompt_tokens": 9000})
    assert not hopeless.fits and "--engine hf" not in hopeless.advice


def _transformers_plan(gpu: str, **overrides: Any) -> Plan:
    recipe = resolve(preset=gpu, overrides=[(key.replace("__", "."), value) for key, value in overrides.items()])
    shape = formulas.known_shape(recipe.model.name)
    assert shape is not None
    return plan(recipe, shape, gpu=gpu, budget_bytes=BUDGETS[gpu])
