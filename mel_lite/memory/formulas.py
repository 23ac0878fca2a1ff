"""Formulas for the GPU memory of each phase of a run, from the model's config and the lengths of a step.

Nothing is loaded or measured: every number is arithmetic over sizes. `docs/memory.md` lists which terms were checked
against real modules and which are estimates.

Letters: e bytes per compute element, H hidden size, I MLP width, A heads * head_dim, K kv_heads * head_dim, L layers,
V vocabulary, N scored tokens, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mel_lite.errors import ModelError
from mel_lite.models.blocks import blocks_of
from mel_lite.models.origin import DEMO

MIB, GIB = 2**20, 2**30

CONTEXT_BYTES = 600 * MIB
"""Estimate of the CUDA context, the loaded kernels and the cuBLAS workspaces of one process."""
ALLOCATOR_SHARE = 0.08
"""Estimate of the memory that PyTorch's caching allocator reserves beyond live tensors, as a fraction of the transient
ones."""
LIBRARIES_BYTES = 450 * MIB
"""Memory of a process on a CPU that has imported torch, TRL and PEFT (measured: RSS)."""
HOST_ALLOCATOR_SHARE = 0.4
"""The same for memory that malloc holds on a CPU, freed between longer-lived blocks."""
HEAD_SCRATCH_BYTES = 192 * MIB
"""Peak scratch memory of the fused log-prob operator, without inputs and u: a tile of logits (160 MiB) plus its
accumulators."""
SAMPLER_BYTES = 30
"""Bytes per vocabulary entry and sequence during sampling: logits in the model's dtype and in float32,
log-probabilities in float32 and float64, their exponentials and cumulative sums."""
LOAD_WORKERS = 4
"""Number of 16-bit tensors on the GPU at the same time while transformers quantizes a checkpoint."""
PREFIX_TOKENS = 320
"""Allowance for the instructions and the chat template in a replay prompt."""

DENSE = ("llama", "mistral", "qwen2", "qwen3")
"""Supported architectures (`model_type`): decoders with gated MLP, grouped-query attention and RMS norms."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a dense decoder model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    context: int = 0
    """Context length in tokens; 0 = unknown."""

    @property
    def attention(self) -> int:
        """A = heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """K = kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(input features, output features) of the seven linear modules in one decoder layer, by name."""
        h, i, a, k = self.hidden, self.intermediate, self.attention, self.kv
        return {
            "q_proj": (h, a), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (a, h),
            "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h),
        }  # fmt: skip


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Read the sizes from a model's `config.json`.

    Raises: ModelError for an unsupported architecture or a missing size.
    """
    kind = config.get("model_type")
    if kind not in DENSE:
        raise ModelError(
            f"model_type={kind!r}: memory can be predicted for {', '.join(DENSE)} only. Train without a prediction, "
            "starting with train.per_device_train_batch_size=1."
        )
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        bias = bool(config.get("attention_bias", False))
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qk_norm=kind == "qwen3",
            qkv_bias=bias or kind == "qwen2",
            o_bias=bias and kind != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            context=config.get("max_position_embeddings") or 0,
        )
    except KeyError as missing:
        raise ModelError(f"the model's config has no {missing}, so memory cannot be predicted.") from None


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool) -> Shape:
    return Shape(layers, hidden, intermediate, heads, 8, 128, 151936, tied, qk_norm=True, context=32768)


KNOWN = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen/Qwen2.5-7B": Shape(28, 3584, 18944, 28, 4, 128, 152064, False, qkv_bias=True, context=32768),
    "meta-llama/Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256, False, context=131072),
    "HuggingFaceTB/SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 64, 49152, True, context=8192),
}
"""Sizes of well-known models, so that planning needs no download. -Base and -Instruct releases share them."""


def known_shape(name: str) -> Shape | None:
    """Return the sizes of a well-known model by its Hub id (or `demo`), or None for any other."""
    if name == DEMO:
        return KNOWN["HuggingFaceTB/SmolLM2-135M"]
    return KNOWN.get(name.removesuffix("-Base").removesuffix("-Instruct"))


# ---- persistent memory -----------------------------------------------------------------------------------------------


def linear_parameters(shape: Shape) -> int:
    """Count the weights of all linear modules except the head: L * sum(inputs * outputs).

    These are the weights that 4-bit loading quantizes.
    """
    return shape.layers * sum(i * o for i, o in shape.linears.values())


def other_parameters(shape: Shape) -> int:
    """Count the parameters that stay in 16 bits: embeddings, an untied head, norms and biases."""
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    biases = (shape.attention + 2 * shape.kv) * shape.qkv_bias + shape.hidden * shape.o_bias
    biases += (2 * shape.intermediate + shape.hidden) * shape.mlp_bias
    return embeddings + shape.layers * (norms + biases) + shape.hidden


def four_bit_bytes(inputs: int, outputs: int, *, double_quant: bool) -> int:
    """Return the bytes of one linear module in NF4: n/2 bytes of codes, one scale per 64 weights, and lookup tables.

    A scale is a float32. With double quantization a scale is one byte, plus one float32 per 256 scales, their float32
    mean, and a table of 256 float32.
    """
    codes = -(-inputs * outputs // 2)
    blocks = -(-inputs * outputs // 64)
    scales = blocks + 4 * -(-blocks // 256) + 4 + 4 * 256 if double_quant else 4 * blocks
    return codes + scales + 4 * 16


def weight_bytes(shape: Shape, *, four_bit: bool, double_quant: bool = True, element_bytes: int = 2) -> int:
    """Return the bytes of the loaded base model: linear weights in 4 bits or e bytes each, the rest in e bytes."""
    others = element_bytes * other_parameters(shape)
    if not four_bit:
        return others + element_bytes * linear_parameters(shape)
    layer = sum(four_bit_bytes(i, o, double_quant=double_quant) for i, o in shape.linears.values())
    return others + shape.layers * layer


def lora_sizes(shape: Shape, rank: int, targets: str | Sequence[str]) -> list[int]:
    """Return the element count of every LoRA tensor: r * inputs and outputs * r for each adapted linear module."""
    names = {target.rpartition(".")[2] for target in targets}
    chosen = [size for name, size in shape.linears.items() if targets == "all-linear" or name in names]
    return [rank * width for size in chosen for width in size] * shape.layers


def optimizer_bytes(sizes: Sequence[int], optim: str, parameter_bytes: int) -> tuple[int, int]:
    """Return the bytes of the optimizer state, and of its temporaries during a step.

    torch's AdamW keeps two moments in the parameter's dtype. 8-bit AdamW keeps two bytes per weight plus one float32
    per 256 elements of each moment; tensors under 4096 elements stay in float32. Unknown names count as float32 AdamW
    with temporaries.
    """
    total = sum(sizes)
    if "8bit" in optim:
        states = sum(8 * n if n < 4096 else 2 * n + 8 * -(-n // 256) for n in sizes)
        return states, 0
    if optim == "sgd":
        return 0, 0
    if optim.startswith(("paged_adamw", "adamw_bnb")):
        return 8 * total, 0
    if optim == "adamw_torch_fused":
        return 2 * parameter_bytes * total, 0
    return max(8, 2 * parameter_bytes) * total, 2 * parameter_bytes * total


# ---- transient memory ------------------------------------------------------------------------------------------------


def kv_cache_bytes(shape: Shape, tokens: int, element_bytes: int = 2) -> int:
    """Return the bytes of the key-value cache: 2 L K e per token."""
    return 2 * shape.layers * shape.kv * element_bytes * tokens


def largest_linear_bytes(shape: Shape, element_bytes: int = 2) -> int:
    """Return the bytes of the largest linear weight, dequantized for a matmul: inputs * outputs * e."""
    return element_bytes * max(i * o for i, o in shape.linears.values())


def mask_bytes(rows: int, tokens: int, element_bytes: int = 2) -> int:
    """Return the bytes of a padded block's attention mask, boolean plus additive bias: rows * tokens^2 * (1 + e).

    0 for a single row, which has no padding and needs no mask.
    """
    return 0 if rows < 2 else rows * tokens * tokens * (1 + element_bytes)


def forward_bytes(shape: Shape, rows: int, tokens: int, element_bytes: int = 2) -> int:
    """Return the peak bytes of a no-gradient forward pass over one block, without the key-value cache.

    The peak is in the up projection, with e (4 I + 3 H) per token: the gate activation, the outputs of base and
    adapter, the scaled output, the residual and the normed input.
    """
    per_token = element_bytes * (4 * shape.intermediate + 3 * shape.hidden)
    return rows * tokens * per_token + mask_bytes(rows, tokens, element_bytes)


def saved_layer_bytes(shape: Shape, rows: int, tokens: int, element_bytes: int = 2, *, casts: bool = False) -> int:
    """Return the bytes that one layer saves for its backward pass without gradient checkpointing.

    Per token e (4 I + 2 H + 2 A + 2 X) + 8 H + 4 (A + K if queries and keys are normed): gate, up, their activation
    and product; both normed inputs; query and attention output; keys and values (X = A where a mask makes SDPA repeat
    them for every head, otherwise K); float32 inputs of the norms.

    `casts`: the adapters are in float32 and the base layers in 16 bits. Each adapter casts its input to float32 and
    autocast casts it back, so query, key, value, gate, up and the output save their own copies: e (3 H + A) more per
    token.
    """
    e, a, k = element_bytes, shape.attention, shape.kv
    repeated = a if rows > 1 else k
    per_token = e * (4 * shape.intermediate + 2 * shape.hidden + 2 * a + 2 * repeated) + 8 * shape.hidden
    per_token += 4 * (a + k) * shape.qk_norm + casts * e * (3 * shape.hidden + a)
    bias = mask_bytes(rows, tokens, e) // (1 + e) * e
    return rows * tokens * per_token + bias


def layer_backward_bytes(shape: Shape, rows: int, tokens: int, element_bytes: int = 2, *, casts: bool = False) -> int:
    """Return the peak bytes of one layer's backward pass: its saved tensors plus the MLP gradients in flight.

    This is saved_layer_bytes plus e (2 I + H) per token: two saved MLP tensors, three MLP gradients and the gradient
    of the layer's output are alive at the same time. `casts` adds 4 I per token for the gradient of the last adapter's
    float32 input.
    """
    per_token = element_bytes * (2 * shape.intermediate + shape.hidden) + casts * 4 * shape.intermediate
    return saved_layer_bytes(shape, rows, tokens, element_bytes, casts=casts) + rows * tokens * per_token


def update_bytes(
    shape: Shape,
    lengths: Sequence[int],
    scored_tokens: int,
    *,
    checkpointing: bool,
    four_bit: bool,
    measured: bool = False,
    casts: bool = False,
    element_bytes: int = 2,
    u_bytes: int = 2,
    head_scratch_bytes: int = HEAD_SCRATCH_BYTES,
) -> int:
    """Return the peak bytes of one forward and backward pass over rows of these lengths.

    Weights and LoRA gradients are not included. Block b has T_b tokens. The backward pass visits the blocks last to
    first and frees each one:

        graph_b = T_b (L H e)                       one hidden state per layer; without checkpointing L saved layers
        norm_b  = 4 H T_b                           float32 input of the last norm
        forward = sum_b (graph_b + norm_b) + N H (2 e + u) + head scratch
        layer_b = sum_{j<=b} graph_j + sum_{j<b} norm_j + layer_backward_bytes_b + N H e
        peak    = max(forward, max_b layer_b + largest dequantized weight, if weights are 4-bit)

    With `measured`, the gradient of each loss term is taken before the training backward pass, and nothing is freed:

        peak    = sum_b (graph_b + 3 norm_b) + max_b layer_backward_bytes_b + N H (e + u) + largest dequantized weight

    Two of the three norms are left in the graph by the two measurements. `casts` as in saved_layer_bytes.

    `N H (2 e + u)` counts the scored hidden states, their copy in one tensor, and u = d logp / d hidden. Logits exist
    only as tiles in the head's scratch.
    """
    e, h = element_bytes, shape.hidden
    blocks = blocks_of(lengths)
    kept, peak, worst_layer = 0, 0, 0
    for rows, tokens in blocks:
        layer = saved_layer_bytes(shape, rows, tokens, e, casts=casts)
        kept += shape.layers * (e * h * rows * tokens if checkpointing else layer)
        kept += mask_bytes(rows, tokens, e) // (1 + e)
        gradients = layer_backward_bytes(shape, rows, tokens, e, casts=casts) - (0 if checkpointing else layer)
        peak, worst_layer = max(peak, kept + gradients), max(worst_layer, gradients)
        kept += 4 * h * rows * tokens
    if measured:
        left = 2 * 4 * h * sum(rows * tokens for rows, tokens in blocks)
        peak = kept + left + worst_layer + scored_tokens * h * u_bytes
    forward = kept + scored_tokens * h * (2 * e + u_bytes) + head_scratch_bytes
    backward = peak + scored_tokens * h * e + (largest_linear_bytes(shape, e) if four_bit else 0)
    return max(forward, backward)


def scoring_bytes(
    shape: Shape,
    block: tuple[int, int],
    scored_tokens: int,
    *,
    four_bit: bool,
    element_bytes: int = 2,
    head_scratch_bytes: int = HEAD_SCRATCH_BYTES,
) -> int:
    """Return the peak bytes of a no-gradient scoring pass: one block at a time, plus all scored hidden states.

    N H 2 e + max(forward_bytes of a block + largest dequantized weight, head scratch).
    """
    dequantized = largest_linear_bytes(shape, element_bytes) if four_bit else 0
    one_block = forward_bytes(shape, *block, element_bytes) + dequantized
    return 2 * element_bytes * shape.hidden * scored_tokens + max(one_block, head_scratch_bytes)


def generation_bytes(
    shape: Shape, sequences: int, prompt_tokens: int, new_tokens: int, *, four_bit: bool, element_bytes: int = 2
) -> int:
    """Return the peak bytes of sampling `sequences` together, without the weights.

    This is the larger of prefill and last token. All prompts are assumed to differ, as in analyses; equal prompts are
    prefilled once.

    prefill = 2 L K e per prompt token + max(forward_bytes + largest dequantized weight, sampler)
    last    = 2 L K e per token + max(sampler, per token: one layer's keys copied for the append (K e), plus keys and
              values repeated for every head (2 A e, if heads share them))
    """
    e = element_bytes
    sampler = sequences * shape.vocab * SAMPLER_BYTES
    dequantized = largest_linear_bytes(shape, e) if four_bit else 0
    forward = forward_bytes(shape, sequences, prompt_tokens, e) + dequantized
    prefill = kv_cache_bytes(shape, sequences * prompt_tokens, e) + max(forward, sampler)
    tokens = sequences * (prompt_tokens + new_tokens)
    repeated = 0 if shape.heads == shape.kv_heads else 2 * shape.attention
    last = kv_cache_bytes(shape, tokens, e) + max(tokens * e * (shape.kv + repeated), sampler)
    return max(prefill, last)


def load_bytes(shape: Shape, *, four_bit: bool, element_bytes: int = 2, on_cpu: bool = False) -> int:
    """Return the transient bytes of loading: a few 16-bit tensors that are being quantized.

    On a CPU, the pages of the 16-bit checkpoint that is read count as the process's memory, too.
    """
    checkpoint = 2 * (linear_parameters(shape) + other_parameters(shape)) if on_cpu else 0
    return checkpoint + (LOAD_WORKERS * largest_linear_bytes(shape, element_bytes) if four_bit else 0)


def export_bytes(shape: Shape, element_bytes: int = 2, *, on_cpu: bool = False) -> int:
    """Return the bytes of an export, after the trained model is released.

    The whole model in 16 bits, plus the largest linear weight and its LoRA update in float32. On a CPU, float32 weights
    are computed with, and the checkpoint's pages count.
    """
    everything = linear_parameters(shape) + other_parameters(shape)
    if on_cpu:
        return (4 + 2) * everything + 2 * largest_linear_bytes(shape, 4)
    return element_bytes * everything + 2 * largest_linear_bytes(shape, 4)
