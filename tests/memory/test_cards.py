"""The card that a plan is for: presets, and the GPU that `--gpu auto` finds."""

from __future__ import annotations

import pytest
import torch

from mel_lite.engines.choice import BNB_PLUGIN, Machine
from mel_lite.errors import ConfigError
from mel_lite.memory import formulas
from mel_lite.memory import plan as planning
from mel_lite.memory.formulas import GIB
from mel_lite.memory.plan import BUDGETS, find_gpu, plan_for

ALL = ("unsloth", "vllm", BNB_PLUGIN)


class FakeCuda:
    """The answers of `torch.cuda` that `find_gpu` uses."""

    def __init__(self, total_gib: float, *, used_gib: float = 0.0, bf16: bool = True) -> None:
        self.total_bytes, self.used_bytes, self.bf16 = int(total_gib * GIB), int(used_gib * GIB), bf16

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        free = self.total_bytes - self.used_bytes - formulas.CONTEXT_BYTES
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, self.total_bytes))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test card")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9) if self.bf16 else (7, 5))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: self.bf16)


@pytest.mark.parametrize(
    ("card", "preset", "bf16"),
    [(FakeCuda(14.7, bf16=False), "16gb", False), (FakeCuda(23.6), "24gb", True), (FakeCuda(47.0), "40gb", True)],
)
def test_auto_takes_the_card_that_is_here(
    monkeypatch: pytest.MonkeyPatch, card: FakeCuda, preset: str, bf16: bool
) -> None:
    card.install(monkeypatch)
    found = find_gpu("auto")
    assert (found.preset, found.budget_bytes, found.whole.total_bytes) == (preset, card.total_bytes, card.total_bytes)
    assert found.whole.free_bytes == card.total_bytes - formulas.CONTEXT_BYTES
    assert found.precision == {"bf16": bf16, "fp16": not bf16}
    recipe, made, _ = plan_for("auto", None, [])
    assert made is not None and made.fits
    assert recipe.train["bf16"] is bf16 and recipe.train["fp16"] is not bf16
    assert plan_for("auto", None, [("train.bf16", not bf16)])[0].train["bf16"] is not bf16, "an option set by hand"
    for asked, other in (("bf16", "fp16"), ("fp16", "bf16")):
        by_hand = plan_for("auto", None, [(f"train.{asked}", True)])[0].train
        assert by_hand[asked] is True and by_hand[other] is False


def test_a_preset_that_is_run_here_gets_no_more_than_this_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(15.8, used_gib=1).install(monkeypatch)
    elsewhere, here = find_gpu("24gb"), find_gpu("24gb", run_here=True)
    assert elsewhere.budget_bytes == elsewhere.whole.total_bytes == BUDGETS["24gb"]
    assert here.whole.total_bytes == int(15.8 * GIB) and here.budget_bytes == int(15.8 * GIB) - GIB
    _, made, _ = plan_for("24gb", None, [("model.name", "Qwen/Qwen3-14B-Base")], run_here=True)
    assert made is not None and not made.fits, "although it fits 24 GB"
    FakeCuda(79.0).install(monkeypatch)
    assert find_gpu("24gb", run_here=True).budget_bytes == BUDGETS["24gb"]


def test_vllms_share_on_a_machine_is_of_its_card_and_of_what_is_free_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth's safe shares are fractions of the free memory."""
    monkeypatch.setattr(planning, "this_machine", lambda processes: Machine((8, 9), frozenset({*ALL})))
    found = {}
    for name, used_gib in (("free", 0.0), ("shared", 5.6)):
        FakeCuda(23.6, used_gib=used_gib).install(monkeypatch)
        recipe, made, _ = plan_for("auto", None, [])
        assert made is not None and made.fits and made.engine.vllm
        found[name] = recipe.model.gpu_memory_utilization
        free_gib = 23.6 - used_gib - formulas.CONTEXT_BYTES / GIB
        assert found[name] == pytest.approx(0.78 * free_gib / 23.6, abs=1e-4)
    FakeCuda(79.0).install(monkeypatch)
    recipe, made, _ = plan_for("24gb", None, [], run_here=True)
    assert made is not None and made.peak_bytes <= BUDGETS["24gb"]
    assert recipe.model.gpu_memory_utilization == pytest.approx(20.0 / 79.0, abs=0.01), "bytes of the budget"


def test_auto_counts_what_others_use_and_refuses_small_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(23.6, used_gib=3).install(monkeypatch)
    assert find_gpu("auto").budget_bytes == int(23.6 * GIB) - 3 * GIB
    FakeCuda(7.8).install(monkeypatch)
    with pytest.raises(ConfigError, match="Test card has 7.8 GiB"):
        find_gpu("auto")


def test_auto_needs_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU here"):
        find_gpu("auto")
    with pytest.raises(ConfigError, match=r"--gpu '24g' is neither a preset nor a known card. Did you mean '24gb'\?"):
        find_gpu("24g")
