"""Predict the seconds of a GRPO step and of a MEL step where decoding is bound by memory.

One engine step samples one token of every live sequence. It reads all weights once, and the cache of every live
sequence:

    seconds = max((weights + sum of caches) / (MEMORY_SHARE * bandwidth), FLOPs / (COMPUTE_SHARE * peak))

Prompts are computed at 2 FLOPs per weight and token, each prompt once. The update takes 6 FLOPs per weight and token
(LoRA with gradient checkpointing: forward, recomputation, gradients of activations). `POINTS` compares the model with
published throughputs of vLLM.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

MEMORY_SHARE = 0.8
"""Share of the memory bandwidth that decoding reaches."""
COMPUTE_SHARE = 0.5
"""Share of the peak of dense bfloat16 products that prefill and update reach."""


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    name: str
    bytes_per_s: float
    flop_per_s: float
    """Dense bfloat16, accumulated in float32."""


@dataclass(frozen=True)
class Size:
    """A model in bfloat16."""

    name: str
    weights: float
    cache_bytes: int
    """Keys and values of one token: 2 * layers * heads of keys * head size * 2 bytes."""


RTX_4090 = Card("RTX 4090", 1.008e12, 1.65e14)
A100 = Card("A100 40 GB", 1.555e12, 3.12e14)
H100 = Card("H100 SXM", 3.35e12, 9.89e14)
MISTRAL = Size("Mistral-7B", 7.25e9, 2 * 32 * 8 * 128 * 2)
LLAMA = Size("Llama-3.1-8B", 8.03e9, 2 * 32 * 8 * 128 * 2)
QWEN = Size("Qwen3-4B", 4.02e9, 2 * 36 * 8 * 128 * 2)


@dataclass(frozen=True)
class Point:
    """A published throughput: `live` requests at all times, each with a prompt of its own."""

    card: Card
    model: Size
    live: int
    prompt_tokens: int
    new_tokens: int
    tokens_per_s: float
    source: str
    with_prefill: bool = True
    """False: the inverse of the time per output token, in which prefill does not count."""


_4090 = "https://mushfiqrahman.dev/?p=1668"
_A100 = "https://johnmusgrave.com/p/vllm-throughput-latency-sweep-on"
_H100 = "https://yobitelcomm.github.io/bench/recipes/concurrency-sweep/"
POINTS = (
    *(
        Point(RTX_4090, MISTRAL, live, 256, 128, rate, _4090)
        for live, rate in ((4, 210), (8, 377), (16, 644), (32, 975), (48, 1190))
    ),
    Point(A100, LLAMA, 1, 1024, 128, 75, _A100, with_prefill=False),
    Point(H100, LLAMA, 1, 128, 128, 1 / 6.48e-3, _H100, with_prefill=False),
    Point(H100, LLAMA, 4, 128, 128, 4 / 6.59e-3, _H100, with_prefill=False),
)
"""Output tokens per second of vLLM. The prompts of the last source are short; their length is not stated."""


@dataclass(frozen=True)
class Workload:
    """One step."""

    card: Card = RTX_4090
    model: Size = QWEN
    prompts: int = 8
    group_size: int = 8
    longest_tokens: int = 1024
    """Completions are uniform between a quarter of this and all of it; so are replays."""
    prompt_tokens: int = 150
    mixed_share: float = 0.6
    """Groups with a right and a wrong completion: one analysis each."""
    leak_free_share: float = 0.7
    """Analyses that are replayed."""
    kept_share: float = 0.5
    """Of those, lessons that are trained on."""
    instruction_tokens: int = 400
    analysis_tokens: int = 350
    seed: int = 0


@dataclass(frozen=True)
class Cost:
    """Seconds of a step by phase, and its generated tokens."""

    decode_s: float
    prefill_s: float
    update_s: float
    tokens: int

    @property
    def whole_s(self) -> float:
        return self.decode_s + self.prefill_s + self.update_s


def step_s(card: Card, model: Size, live: int, cached_tokens: float) -> float:
    """Return the seconds of one engine step."""
    memory_s = (2 * model.weights + model.cache_bytes * cached_tokens) / (MEMORY_SHARE * card.bytes_per_s)
    return max(memory_s, 2 * model.weights * live / (COMPUTE_SHARE * card.flop_per_s))


def prefill_s(card: Card, model: Size, tokens: float) -> float:
    return 2 * model.weights * tokens / (COMPUTE_SHARE * card.flop_per_s)


def predicted(point: Point) -> float:
    """Return the output tokens per second that the model predicts for a published point."""
    cached = point.live * (point.prompt_tokens + point.new_tokens / 2)
    seconds = step_s(point.card, point.model, point.live, cached)
    if point.with_prefill:
        seconds += prefill_s(point.card, point.model, point.live * point.prompt_tokens / point.new_tokens)
    return point.live / seconds


def decode_s(load: Workload, sequences: Sequence[tuple[int, int]]) -> float:
    """Return the seconds of decoding (prompt tokens, new tokens) together until the longest has ended."""
    seconds = 0.0
    for position in range(max((new for _, new in sequences), default=0)):
        live = [prompt + position for prompt, new in sequences if new > position]
        seconds += step_s(load.card, load.model, len(live), sum(live))
    return seconds


def costs(load: Workload) -> dict[str, Cost]:
    """Return the cost of a step of plain GRPO, of MEL strict and of MEL overlapped in its steady state."""
    draw, mixed = random.Random(load.seed), round(load.prompts * load.mixed_share)
    lengths = [
        draw.randint(load.longest_tokens // 4, load.longest_tokens) for _ in range(load.prompts * load.group_size)
    ]
    rollouts = [(load.prompt_tokens, new) for new in lengths]
    contexts = [
        load.prompt_tokens + load.instruction_tokens + lengths[i] + lengths[i + 1]
        for i in range(0, mixed * load.group_size, load.group_size)
    ]
    analyses = [(context, load.analysis_tokens) for context in contexts]
    prompt = load.prompt_tokens + load.analysis_tokens
    replays = [(prompt, draw.choice(lengths)) for _ in range(round(mixed * load.leak_free_share))]
    kept = contexts[: round(mixed * load.leak_free_share * load.kept_share)]
    lessons = analyses + replays
    of_rollouts = sum(sum(each) for each in rollouts)
    of_lessons = sum(context + load.analysis_tokens for context in kept)

    def cost(decoded_s: float, sequences: list[tuple[int, int]], trained: int) -> Cost:
        prompts = load.prompts * load.prompt_tokens + sum(prompt for prompt, _ in sequences)
        update_s = 6 * load.model.weights * trained / (COMPUTE_SHARE * load.card.flop_per_s)
        tokens = sum(lengths) + sum(new for _, new in sequences)
        return Cost(decoded_s, prefill_s(load.card, load.model, prompts), update_s, tokens)

    alone_s = decode_s(load, rollouts)
    strict_s = alone_s + decode_s(load, analyses) + decode_s(load, replays)
    return {
        "GRPO": cost(alone_s, [], of_rollouts),
        "MEL, strict": cost(strict_s, lessons, of_rollouts + of_lessons),
        "MEL, overlap": cost(decode_s(load, rollouts + lessons), lessons, of_rollouts + of_lessons),
    }


WORKLOADS = {
    "8 x 8 completions of up to 1024": Workload(),
    "8 x 8 completions of up to 2048": replace(Workload(), longest_tokens=2048),
    "8 x 8 completions of up to 512": replace(Workload(), longest_tokens=512),
    "4 x 8 completions of up to 1024": replace(Workload(), prompts=4),
    "8 x 8 completions of up to 1024, every group mixed": replace(Workload(), mixed_share=1.0),
}


if __name__ == "__main__":
    for each in POINTS:
        print(each.card.name, each.model.name, each.live, each.tokens_per_s, round(predicted(each)))
    for name, workload in WORKLOADS.items():
        found = costs(workload)
        alone = found["GRPO"]
        for arm, cost in found.items():
            print(name, arm, cost, round(cost.whole_s / alone.whole_s, 3), round(cost.tokens / alone.tokens, 3))
