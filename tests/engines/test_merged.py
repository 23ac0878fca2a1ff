"""Copies of the weights that sample: with the adapter added in, and packed where oneDNN can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from mel_lite.engines import hf, merged
from mel_lite.engines.base import Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.engines.merged import WORTH_TOKENS
from mel_lite.models.load import ModelSpec, load_base
from tiny_models import save_tiny

packs_or_not = pytest.mark.parametrize("packs", [True, False])


def _choose(monkeypatch: pytest.MonkeyPatch, *, packs: bool) -> None:
    assert merged._can_pack(), "torch of this environment has oneDNN's operators"
    if not packs:
        monkeypatch.setattr(merged, "_can_pack", lambda: False)


def _sampled(model: Any, *, merges: bool, tokens: int = WORTH_TOKENS) -> list[Any]:
    requests = [Request(tuple(range(10, 14 + seed % 3)), seed) for seed in range(12)]
    engine = HFEngine(model, eos_ids=[2], pad_id=0, merges_adapter=lambda: merges)
    return engine.generate(requests, Sampling(tokens, temperature=0.8))


@packs_or_not
def test_merged_weights_sample_the_same_and_leave_no_trace(
    model: Any, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    """The trained weights are the same tensors afterwards."""
    _choose(monkeypatch, packs=packs)
    before = {name: (weight.data_ptr(), weight.detach().clone()) for name, weight in model.named_parameters()}
    entered: list[bool] = []
    monkeypatch.setattr(hf, "merged", lambda each: entered.append(True) or merged.merged(each))
    apart, together = _sampled(model, merges=False), _sampled(model, merges=True)
    assert entered == [True]
    assert [c.ids for c in together] == [c.ids for c in apart]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)
    for name, weight in model.named_parameters():
        assert weight.data_ptr() == before[name][0] and torch.equal(weight, before[name][1]), name
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer))
    assert not any(isinstance(layer.forward, merged._Packed) for layer in model.modules())
    assert _sampled(model, merges=True, tokens=WORTH_TOKENS - 1) and len(entered) == 1, "too short to pay"


def test_the_logits_of_packed_and_merged_weights_are_those_of_base_and_adapter(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(10, 40).view(3, 10)
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
        with merged.merged(model):
            packed = model(input_ids=ids).logits
            copies = [layer.forward for layer in model.modules() if isinstance(layer.forward, merged._Packed)]
        _choose(monkeypatch, packs=False)
        with merged.merged(model):
            together = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, apart)
    used = [each for each in copies if each._copy is not None]
    assert len(used) == 1 + sum(isinstance(layer, LoraLayer) for layer in model.modules()), "the head, too"
    torch.testing.assert_close(packed, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-4)
    assert (apart - base).abs().max() > 1e-2, "an adapter that does nothing would pass"


@pytest.mark.parametrize("bias", [True, False])
def test_packed_products_of_odd_sizes_and_strides(bias: bool) -> None:
    layer = nn.Linear(37, 13, bias=bias)
    packed = merged._Packed(layer, layer.weight.detach)
    with torch.no_grad():
        for rows in (torch.randn(1, 1, 37), torch.randn(5, 37, 3).transpose(1, 2), torch.randn(70, 40)[:, 3:]):
            torch.testing.assert_close(packed(rows), layer(rows), rtol=0, atol=1e-5)


@packs_or_not
def test_weights_come_back_when_sampling_ends_in_an_error(
    model: Any, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> None:
    _choose(monkeypatch, packs=packs)
    base = next(layer for layer in model.modules() if isinstance(layer, LoraLayer)).get_base_layer()
    pointer = base.weight.data_ptr()
    with pytest.raises(KeyboardInterrupt), merged.merged(model):
        assert (base.weight.data_ptr() == pointer) == packs and ("forward" in vars(base)) == packs
        raise KeyboardInterrupt
    assert base.weight.data_ptr() == pointer and "forward" not in vars(base)
    assert merged.why_not_merged(model) is None


def test_a_forward_that_something_else_replaced_is_kept(model: Any) -> None:
    """Hooks of accelerate replace the forward of a layer, for instance to move its weights."""
    base = next(layer for layer in model.modules() if isinstance(layer, LoraLayer)).get_base_layer()
    ids, calls, plain = torch.arange(10, 20)[None], [], base.forward
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        base.forward = lambda rows: calls.append(True) or plain(rows)
        try:
            with merged.merged(model):
                together = model(input_ids=ids).logits
            assert "forward" in vars(base)
        finally:
            del base.forward
    assert calls == [True]
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-4)


def test_what_could_not_be_merged_exactly_is_not(model: Any, tmp_path: Path) -> None:
    why = merged.why_not_merged
    assert why(model) is None
    assert "without an adapter" in str(why(load_base(ModelSpec(str(save_tiny(tmp_path)), dtype="float32"))))
    with model.disable_adapter():
        assert "off" in str(why(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(why(model))
    first = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
    base = first.get_base_layer()
    base.weight.data = base.weight.data.bfloat16()
    try:
        assert "not float32" in str(why(model))
    finally:
        base.weight.data = base.weight.data.float()
