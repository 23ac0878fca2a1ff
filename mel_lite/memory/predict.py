"""Predict the peak memory of every phase of a run from its workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mel_lite.memory import formulas
from mel_lite.memory import vllm as vllm_memory
from mel_lite.memory.formulas import CONTEXT_BYTES
from mel_lite.memory.workload import Part, Workload
from mel_lite.models.blocks import blocks_of


@dataclass(frozen=True, slots=True)
class Phase:
    """Predicted peak of one phase of a run."""

    name: str
    bytes: int
    parts: dict[str, int]
    """Bytes by use; they sum to `bytes`."""


def predict(load: Workload) -> tuple[Phase, ...]:
    """Predict the peak of every phase of a run, in order.

    A peak is persistent memory plus transient memory, and the allocator's overhead on the latter.
    """
    shape, e = load.shape, load.element_bytes
    parameter_bytes, parameters = load.adapter_bytes, sum(load.lora)
    states, temporaries = formulas.optimizer_bytes(load.lora, load.optim, parameter_bytes)
    adapter = {"LoRA": parameter_bytes * parameters, "optimizer states": states}
    asleep = {"vLLM asleep": vllm_memory.resident_bytes(shape, load.vllm.rank, e)} if load.vllm else {}
    gradients = {"LoRA gradients": parameter_bytes * parameters}

    def phase(name: str, transient: Mapping[str, int], persistent: Mapping[str, int] | None = None) -> Phase:
        persistent = {**adapter, **asleep} if persistent is None else persistent
        parts = {**_overhead(load, sum(transient.values())), "weights": load.weight_bytes, **persistent, **transient}
        return Phase(name, sum(parts.values()), parts)

    if load.vllm:
        # vLLM's share is fixed whatever it samples, and includes its allocator overhead.
        share = _share_parts(load)
        phases = [phase("load", {}, share), *(phase(name, {}, {**adapter, **share}) for name in load.sampled)]
    else:
        read = formulas.load_bytes(shape, four_bit=load.four_bit, on_cpu=load.on_cpu)
        phases = [phase("load", {"tensors being loaded": read}, {})]
        phases += [phase(name, _generation(load, name)) for name in load.sampled]
    if scored := _scoring(load):
        phases.append(phase("scoring", {"activations": scored}))
    phases.append(phase("update", max((_update(load, part) for part in load.fullest_parts), key=_total)))
    vectors = 16 * parameters if load.measures_gradients else 0
    phases.append(phase("optimizer", {**gradients, "temporaries": temporaries, "measured gradients": vectors}))
    if load.exports:
        # The trained model is released first; `weights` are those of the merged model.
        merged = formulas.export_bytes(shape, e, on_cpu=load.on_cpu)
        parts = {**_overhead(load, merged), "weights": merged}
        phases.append(Phase("export", _total(parts), parts))
    return tuple(phases)


def _overhead(load: Workload, transient_bytes: int) -> dict[str, int]:
    """Return the bytes of what a process needs before it has a tensor, and of what the allocator wastes."""
    if load.on_cpu:
        wasted = int(formulas.HOST_ALLOCATOR_SHARE * transient_bytes)
        return {"libraries and allocator": formulas.LIBRARIES_BYTES + wasted}
    return {"CUDA and allocator": CONTEXT_BYTES + int(formulas.ALLOCATOR_SHARE * transient_bytes)}


def _share_parts(load: Workload) -> dict[str, int]:
    """Split vLLM's share, without the weights, by use."""
    assert load.vllm is not None
    asleep = vllm_memory.resident_bytes(load.shape, load.vllm.rank, load.element_bytes)
    cache = max(0, load.share_bytes - load.weight_bytes - load.vllm_overhead_bytes)
    activations = load.vllm_overhead_bytes - asleep
    return {"vLLM's adapter and graphs": asleep, "vLLM's activations": activations, "vLLM's cache": cache}


def _generation(load: Workload, name: str) -> dict[str, int]:
    sequences, (_, prompt_tokens, new_tokens) = load.at_once(name), load.sampled[name]
    options: dict[str, Any] = {"four_bit": load.four_bit, "element_bytes": load.element_bytes}
    total = formulas.generation_bytes(load.shape, sequences, prompt_tokens, new_tokens, **options)
    cache = formulas.kv_cache_bytes(load.shape, sequences * (prompt_tokens + new_tokens), load.element_bytes)
    copies = {}
    if load.on_cpu and load.element_bytes == 4 and not load.four_bit:  # a copy with the adapter in it samples
        copied = formulas.linear_parameters(load.shape) + load.shape.vocab * load.shape.hidden
        copies["merged weights"] = load.element_bytes * copied
    return {"KV cache": min(cache, total), "activations": max(0, total - cache), **copies}


def _scoring(load: Workload) -> int:
    """Return the peak bytes of no-gradient passes; 0 if there are none.

    Lessons are scored after their update, one row at a time; rollouts are scored if TRL needs their log-probs, and read
    with notes in their prompts if the internalisation has teachers.
    """
    options: dict[str, Any] = {"four_bit": load.four_bit, "element_bytes": load.element_bytes}
    peak = 0
    if load.pairs:
        block = (1, load.lesson_tokens)
        peak = formulas.scoring_bytes(load.shape, block, load.pairs * load.analysis_tokens, **options)
    if load.scores_rollouts:
        rows = load.micro_batch
        if load.max_micro_batch_tokens is not None:
            rows = max(1, min(rows, load.max_micro_batch_tokens // load.rollout_tokens))
        block = (rows, load.rollout_tokens)
        scored = load.completions * load.completion_tokens
        peak = max(peak, formulas.scoring_bytes(load.shape, block, scored, **options))
    if load.teacher_states:
        block = (1, load.context_tokens + load.completion_tokens)
        scored = load.completions * load.completion_tokens
        others = (load.teacher_states - 1) * _teacher_bytes(load)
        peak = max(peak, others + formulas.scoring_bytes(load.shape, block, scored, **options))
    return peak


def _teacher_bytes(load: Workload) -> int:
    """Return the bytes of one hidden state per token of all rollouts: completions * C * H * e."""
    return load.completions * load.completion_tokens * load.shape.hidden * load.element_bytes


def _total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def _update(load: Workload, part: Part) -> dict[str, int]:
    """Return the bytes of forward and backward over one part of a micro-batch, and of the gradients it leaves."""
    sixteen_bit = not load.four_bit and load.element_bytes == 2
    activations = formulas.update_bytes(
        load.shape,
        part.lengths,
        part.scored_tokens,
        checkpointing=load.checkpointing,
        four_bit=load.four_bit,
        measured=load.measures_gradients,
        # PEFT keeps float32 adapters on 16-bit layers; adapters on 4-bit layers leave the casting to autocast.
        casts=sixteen_bit,
        element_bytes=load.element_bytes,
        u_bytes=4 if load.fp16 or load.element_bytes == 4 else 2,
    )
    parameters = sum(load.lora)
    # Autograd sums a weight's gradients over several blocks before it adds the sum to `grad`.
    in_flight = 2 if len(blocks_of(part.lengths)) > 1 else 1
    # Autocast keeps a 16-bit copy of an adapter in another dtype. The gradient meter keeps a float32 sum for each loss
    # term, in addition to the gradient being added.
    copies = 2 * parameters if load.fp16 or not load.four_bit else 0
    sums = 12 * parameters if load.measures_gradients else 0
    return {
        "LoRA gradients": in_flight * load.adapter_bytes * parameters,
        "activations": activations,
        "adapter copies": copies,
        "measured gradients": sums,
        "teachers": _teacher_bytes(load) if load.teacher_states else 0,
    }
