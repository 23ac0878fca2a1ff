"""Attention and dtypes for GPUs without bfloat16 and flash attention (T4), as far as a CPU can test them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from mel_lite.models import attention
from mel_lite.models.attention import NAME, attention_for, register
from mel_lite.models.load import ModelSpec, load_base
from mel_lite.recipe import resolve
from mel_lite.run import finish
from mel_lite.training.assemble import prepare_weights
from tiny_models import save_tiny, tiny_config


def logits_and_gradient(model: Any, mask_BT: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = torch.arange(40).reshape(2, 20)
    logits = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    model.zero_grad()
    logits.square().mean().backward()
    return logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()


@pytest.mark.parametrize("padded", [False, True])
def test_grouped_heads_equal_sdpa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    register()
    folder = str(save_tiny(tmp_path / "base", "qwen3"))
    mask_BT = torch.ones(2, 20, dtype=torch.long)
    mask_BT[0, :6] = 0 if padded else 1
    expected = logits_and_gradient(load_base(ModelSpec(folder, attn_implementation="sdpa")), mask_BT)
    heads = []
    original = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        assert not (options["is_causal"] and options["attn_mask"] is not None), "GPU kernels reject both together"
        heads.append((query.shape[1], key.shape[1], value.shape[1], options.get("enable_gqa", False)))
        return original(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    found = logits_and_gradient(load_base(ModelSpec(folder, attn_implementation=NAME)), mask_BT)
    assert heads == [(4, 4, 4, False)] * 2, "as many key heads as query heads in both layers"
    rows = mask_BT.bool()
    torch.testing.assert_close(found[0][rows], expected[0][rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-7)
    assert expected[1].abs().sum() > 0


def test_generation_is_the_same_without_repeating_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    folder = str(save_tiny(tmp_path / "base", "qwen3"))
    ids_BT = torch.arange(5, 25).reshape(2, 10)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = 0
    heads = []
    original = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        heads.append((query.shape[1], query.shape[2], key.shape[1]))
        return original(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    written = [
        load_base(ModelSpec(folder, attn_implementation=name)).generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=12, do_sample=False
        )
        for name in ("sdpa", NAME)
    ]
    assert torch.equal(*written) and written[0].shape[1] > 12
    ours = heads[len(heads) // 2 :]
    assert ours[0] == (4, 10, 4), "a prompt has its keys repeated"
    assert set(ours[2:]) == {(2, 2, 2)}, "a sampled token has not: two query heads are two queries of one key head"


@pytest.mark.parametrize(
    ("requested", "capability", "chosen"),
    [
        (None, (7, 5), NAME),
        (None, (8, 0), None),
        ("eager", (7, 5), "eager"),
        (None, None, NAME),
        ("sdpa", None, "sdpa"),
    ],
)
def test_it_is_chosen_without_flash_attention(
    monkeypatch: pytest.MonkeyPatch, requested: str | None, capability: tuple[int, int] | None, chosen: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert attention_for(requested) == chosen
    assert attention.FLASH_CAPABILITY == (8, 0)


@pytest.mark.parametrize(("fp16", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_fp16_trains_a_float32_adapter(fp16: bool, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3"), dtype=torch.float16)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), autocast_adapter_dtype=False)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16()  # like TRL does with the adapter of a 4-bit base
    before = {name: weight.detach().clone() for name, weight in adapted.named_parameters()}
    prepare_weights(SimpleNamespace(model=adapted, args=SimpleNamespace(fp16=fp16)))
    trained = {weight.dtype for weight in adapted.parameters() if weight.requires_grad}
    frozen = {weight.dtype for weight in adapted.parameters() if not weight.requires_grad}
    assert trained == {dtype} and frozen == {torch.float16}
    assert all(torch.equal(weight.to(before[name].dtype), before[name]) for name, weight in adapted.named_parameters())


def test_an_export_that_does_not_fit_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(finish, "export", full)
    console = Console(width=200, record=True, file=(tmp_path / "shown").open("w"))
    assert finish.export_trained(resolve(preset="24gb"), tmp_path / "adapter", tmp_path, console) is None
    assert f"CUDA_VISIBLE_DEVICES= mel-lite export {tmp_path}" in console.export_text().replace("\n", "")
