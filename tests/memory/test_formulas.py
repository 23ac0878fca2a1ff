"""Memory formulas, compared with real modules, real optimizers and the live bytes of real passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from live_bytes import LiveBytes
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import ModelError
from mel_lite.memory import formulas
from mel_lite.models.blocks import blocks_of
from mel_lite.models.load import ModelSpec, load_base
from mel_lite.training.batches.packing import Row, pack
from mel_lite.training.scoring import install_scoring_head, score
from tiny_models import save_tiny, tiny_config

KINDS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def config(kind: str, **sizes: Any) -> Any:
    defaults = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return KINDS[kind](**{**defaults, **sizes})


def with_lora(model: Any, rank: int = 8) -> Any:
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=False).to(torch.bfloat16)


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def parameters_of(shape: formulas.Shape) -> int:
    return formulas.linear_parameters(shape) + formulas.other_parameters(shape)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 8, "head_dim": 64}])
def test_parameters_are_counted_as_the_modules_have_them(kind: str, options: dict[str, Any]) -> None:
    biased = {"attention_bias": True, "mlp_bias": True} if kind == "llama" and options else {}
    made = config(kind, **options, **biased)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    shape = formulas.shape_of(made.to_dict())
    assert formulas.linear_parameters(shape) == sum(weight.numel() for weight in linear)
    assert parameters_of(shape) == sum(weight.numel() for weight in model.parameters())


def test_the_table_has_the_published_parameter_counts() -> None:
    published = {
        "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-1.7B": 1_720_574_976, "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen3-14B": 14_768_307_200, "Qwen/Qwen2.5-7B": 7_615_616_512,
        "meta-llama/Llama-3.1-8B": 8_030_261_248, "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    }  # fmt: skip
    assert {name: parameters_of(shape) for name, shape in formulas.KNOWN.items()} == published
    assert formulas.known_shape("Qwen/Qwen3-8B-Base") is formulas.KNOWN["Qwen/Qwen3-8B"]
    assert formulas.known_shape("mine/Qwen3-8B") is None


@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bit_weights_take_the_bytes_they_have_when_loaded(tmp_path: Path, double_quant: bool) -> None:
    folder = save_tiny(tmp_path / "base", "qwen3", tied=False, hidden=128)
    model = load_base(ModelSpec(str(folder), dtype="bfloat16", load_in_4bit=True, double_quant=double_quant))
    loaded = 0
    for weight in model.parameters():
        loaded += weight.untyped_storage().nbytes()
        if (state := getattr(weight, "quant_state", None)) is not None:
            tensors = [state.absmax, state.code]
            tensors += [state.offset, state.state2.absmax, state.state2.code] if double_quant else []
            loaded += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    shape = formulas.shape_of(tiny_config("qwen3", tied=False, hidden=128).to_dict())
    assert formulas.weight_bytes(shape, four_bit=True, double_quant=double_quant) == loaded


def test_sixteen_bit_weights_take_two_bytes_each() -> None:
    shape = formulas.KNOWN["Qwen/Qwen3-4B"]
    assert formulas.weight_bytes(shape, four_bit=False) == 2 * parameters_of(shape)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_lora_tensors_are_those_of_peft(targets: Any) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    sizes = sorted(weight.numel() for name, weight in adapted.named_parameters() if "lora_" in name)
    assert sorted(formulas.lora_sizes(formulas.shape_of(model.config.to_dict()), 4, targets)) == sizes


@pytest.mark.parametrize(
    ("optim", "dtype"),
    [("adamw_torch", torch.float32), ("adamw_torch_fused", torch.bfloat16), ("paged_adamw_8bit", torch.bfloat16)],
)
def test_optimizer_states_have_the_predicted_size(optim: str, dtype: torch.dtype) -> None:
    from bitsandbytes.optim import AdamW8bit

    weights = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (1000, 4096, 10_001)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    made = AdamW8bit(weights) if "8bit" in optim else torch.optim.AdamW(weights)
    made.step()
    # Not counted: the lookup tables that all 8-bit tensors share, and torch's scalar step counts.
    names = ("state1", "state2", "absmax1", "absmax2", "exp_avg", "exp_avg_sq")
    held = sum(s[name].nbytes for s in made.state.values() for name in names if name in s)
    assert formulas.optimizer_bytes([1000, 4096, 10_001], optim, dtype.itemsize)[0] == held


def test_the_cache_takes_what_a_real_one_takes() -> None:
    made = tiny_config("llama")
    model, cache = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16), DynamicCache()
    model(input_ids=torch.ones(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert formulas.kv_cache_bytes(formulas.shape_of(made.to_dict()), 3 * 7) == held


def cpu_scratch_bytes(shape: formulas.Shape, scored_tokens: int) -> int:
    """Scratch of the log-prob operator on a CPU in bfloat16: logits, exponentials, accumulators, a tile of weights."""
    rows, columns = min(1024, scored_tokens), min(2048, shape.vocab)
    return 8 * rows * columns + 4 * (rows + columns) * shape.hidden


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("kind", "sizes", "lengths", "scored"),
    [
        ("qwen3", {}, [256, 250], [200, 200]),
        ("llama", {}, [512], [300]),
        ("llama", {}, [512, 256, 250], [100, 200, 200]),
        pytest.param(
            "qwen3",
            {"hidden_size": 128, "num_hidden_layers": 12, "num_key_value_heads": 8},
            [512, 200, 190],
            [9, 150, 1],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_update_peaks_where_predicted(
    kind: str, sizes: dict[str, Any], lengths: list[int], scored: list[int], checkpointing: bool
) -> None:
    """The trainer's own forward, in bfloat16 with LoRA; within 5 %."""
    made = config(kind, **sizes)
    base = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    install_scoring_head(base)
    model = with_lora(base).train()
    model = checkpointed(model) if checkpointing else model
    packed = pack([Row(torch.arange(n), s) for n, s in zip(lengths, scored, strict=True)], pad_id=0)
    shape = formulas.shape_of(made.to_dict())
    options = {"four_bit": False, "head_scratch_bytes": cpu_scratch_bytes(shape, sum(scored))}

    for weight in model.parameters():  # the plan counts gradients by themselves
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as live:
        torch.cat(score(model, packed)[0]).sum().backward()
    predicted = formulas.update_bytes(shape, lengths, sum(scored), checkpointing=checkpointing, **options)
    if len(packed.blocks) > 1:  # autograd sums a weight's gradients of all blocks before it adds them to `grad`
        predicted += sum(gradient.nbytes for gradient in gradients)
    assert live.peak_bytes > 1e6
    assert predicted == pytest.approx(live.peak_bytes, rel=0.05)

    with torch.no_grad(), LiveBytes([*model.parameters(), *model.buffers(), *gradients]) as live:
        score(model, packed)
    block = max(blocks_of(lengths), key=lambda block: block[0] * block[1])
    assert formulas.scoring_bytes(shape, block, sum(scored), **options) == pytest.approx(live.peak_bytes, rel=0.10)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(
    ("kind", "sizes", "lengths", "scored"),
    [
        ("qwen3", {}, [256, 250], [200, 200]),
        ("llama", {"num_hidden_layers": 12}, [512], [300]),
        ("llama", {}, [512, 256, 250], [100, 200, 200]),
        ("qwen2", {"intermediate_size": 1536}, [512], [300]),
    ],
)
def test_float32_adapters_under_autocast_peak_where_predicted(
    kind: str, sizes: dict[str, Any], lengths: list[int], scored: list[int], checkpointing: bool
) -> None:
    """PEFT's float32 adapters on a 16-bit base: copies of their inputs, and gradients in float32. Within 10 %."""
    made = config(kind, **sizes)
    base = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    install_scoring_head(base)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    model = checkpointed(model) if checkpointing else model
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    packed = pack([Row(torch.arange(n), s) for n, s in zip(lengths, scored, strict=True)], pad_id=0)
    with LiveBytes([*model.parameters(), *model.buffers(), *[weight.grad for weight in trained]]) as live:
        with torch.autocast("cpu", torch.bfloat16):
            logp = torch.cat(score(model, packed)[0]).sum()
        logp.backward()
    shape = formulas.shape_of(made.to_dict())
    options = {"four_bit": False, "head_scratch_bytes": cpu_scratch_bytes(shape, sum(scored))}
    options["checkpointing"] = checkpointing
    others = sum(2 * weight.numel() for weight in trained)  # the weights' own 16-bit copies
    if len(packed.blocks) > 1:
        others += sum(weight.nbytes for weight in trained)
    predicted = formulas.update_bytes(shape, lengths, sum(scored), casts=True, **options)
    assert predicted + others == pytest.approx(live.peak_bytes, rel=0.10)
    assert predicted > 1.1 * formulas.update_bytes(shape, lengths, sum(scored), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lengths", "scored"),
    [
        pytest.param("llama", [512, 256, 250], [100, 100, 100], marks=pytest.mark.slow),
        ("qwen3", [300, 280, 256], [200, 9, 100]),
    ],
)
def test_measuring_both_gradients_peaks_where_predicted(kind: str, lengths: list[int], scored: list[int]) -> None:
    """The passes of `GradientMeter`: the gradient of each loss term, then the training backward pass."""
    made = config(kind, num_hidden_layers=12)
    base = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    install_scoring_head(base)
    model = checkpointed(with_lora(base).train())
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    packed = pack([Row(torch.arange(n), s) for n, s in zip(lengths, scored, strict=True)], pad_id=0)
    with LiveBytes([*model.parameters(), *model.buffers(), *[weight.grad for weight in trained]]) as live:
        logps = score(model, packed)[0]
        policy, nll = torch.cat(logps[1:]).sum(), logps[0].sum()
        for term in (policy, nll):
            torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        (policy + nll).backward()
    shape = formulas.shape_of(made.to_dict())
    options = {"four_bit": False, "checkpointing": True, "head_scratch_bytes": cpu_scratch_bytes(shape, sum(scored))}
    predicted = formulas.update_bytes(shape, lengths, sum(scored), measured=True, **options)
    assert predicted > 1.05 * formulas.update_bytes(shape, lengths, sum(scored), **options)
    gradients = sum(weight.nbytes for weight in trained)
    assert predicted + gradients == pytest.approx(live.peak_bytes, rel=0.08)


@pytest.mark.parametrize(
    ("kind", "sizes", "prompts", "new_tokens"),
    [
        ("qwen3", {}, [256] * 7 + [200], 4),
        pytest.param("llama", {}, [32] * 7 + [20], 60, marks=pytest.mark.slow),
        ("llama", {"num_key_value_heads": 8}, [32] * 7 + [20], 60),
        ("qwen3", {"vocab_size": 4096, "num_hidden_layers": 2}, [16] * 15 + [12], 32),
    ],
)
def test_generation_peaks_where_predicted(
    kind: str, sizes: dict[str, Any], prompts: list[int], new_tokens: int
) -> None:
    made = config(kind, **{"num_hidden_layers": 4, **sizes})
    model = with_lora(AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16))
    engine = HFEngine(model, eos_ids=[made.vocab_size], pad_id=0)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        engine.generate([Request((3 + i,) * n, i) for i, n in enumerate(prompts)], Sampling(new_tokens))
    shape = formulas.shape_of(made.to_dict())
    predicted = formulas.generation_bytes(shape, len(prompts), max(prompts), new_tokens, four_bit=False)
    # Models that go through `model.generate` also hold its masked logits, which are planned for.
    assert 0.90 * live.peak_bytes <= predicted <= 1.15 * live.peak_bytes


class StandInHead(torch.autograd.Function):
    """Keeps the same tensor as the fused operator: u, in the shape of the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(hidden_NH))
        return hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad_N: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return ctx.saved_tensors[0] * grad_N[:, None].to(torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "layers", "rows", "tokens"),
    [
        pytest.param("Qwen/Qwen3-8B", 36, 4, 3072, marks=pytest.mark.slow),
        ("Qwen/Qwen3-4B", 6, 2, 2048),
        ("Qwen/Qwen2.5-7B", 6, 2, 3072),
    ],
)
def test_an_update_of_a_large_model_peaks_where_predicted(name: str, layers: int, rows: int, tokens: int) -> None:
    """Layers of full size on tensors without storage: only shapes are computed. One model has all of its layers.

    Within 3 %.
    """
    shape = replace(formulas.KNOWN[name], layers=layers)
    made = (Qwen3Config if shape.qk_norm else Qwen2Config)(
        vocab_size=512, hidden_size=shape.hidden, intermediate_size=shape.intermediate, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
    )  # fmt: skip
    with torch.device("meta"):
        model = checkpointed(with_lora(AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16), rank=32)).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for key, weight in module._parameters.items():
                if weight is not None:
                    fake = torch.empty(weight.shape, dtype=weight.dtype)
                    module._parameters[key] = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        ids_BT = torch.zeros(rows, tokens, dtype=torch.long)
        index_N = torch.zeros(rows * 1024, dtype=torch.long)
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            hidden = model.get_base_model().base_model(input_ids=ids_BT, attention_mask=ids_BT, use_cache=False)[0]
            scored_NH = torch.cat([hidden[:, :-1][index_N, index_N]])
            logp_N = StandInHead.apply(scored_NH)
            del hidden, scored_NH
            logp_N.sum().backward()
    predicted = formulas.update_bytes(
        shape, [tokens] * rows, rows * 1024, checkpointing=True, four_bit=False, head_scratch_bytes=0
    )
    assert live.peak_bytes > 2e8
    assert predicted == pytest.approx(live.peak_bytes, rel=0.03)


def test_other_architectures_are_not_guessed() -> None:
    with pytest.raises(ModelError, match="model_type='gemma3'.*llama, mistral, qwen2, qwen3"):
        formulas.shape_of({"model_type": "gemma3"})
    with pytest.raises(ModelError, match="no 'hidden_size'"):
        formulas.shape_of({"model_type": "llama", "num_attention_heads": 4})
