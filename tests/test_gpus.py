"""Presets by memory, and the preset of a card that is named."""

from __future__ import annotations

import pytest

from mel_lite.errors import ConfigError
from mel_lite.gpus import CARDS_GB, GPU_PRESETS, SIZES_GB, preset_of


@pytest.mark.parametrize("name", [*GPU_PRESETS, "auto", "24GB"])
def test_a_preset_is_itself(name: str) -> None:
    assert preset_of(name) == (name.lower(), "")


@pytest.mark.parametrize(
    ("given", "preset", "size_gb"),
    [("4090", "24gb", 24), ("rtx4090", "24gb", 24), ("NVIDIA GeForce RTX 4090", "24gb", 24), ("RTX-3060", "12gb", 12),
     ("3060-12gb", "12gb", 12), ("t4", "16gb", 16), ("Tesla T4", "16gb", 16), ("a100", "40gb", 40),
     ("NVIDIA A100-SXM4-80GB", "80gb", 80), ("a100-80gb", "80gb", 80), ("a10080gb", "80gb", 80),
     ("a10-24gb", "24gb", 24), ("NVIDIA H100 80GB HBM3", "80gb", 80),
     ("l4", "24gb", 24), ("l40s", "40gb", 48), ("h100", "80gb", 80), ("H200", "80gb", 141), ("5090", "24gb", 32),
     ("v100-32gb", "24gb", 32), ("2080ti-22gb", "16gb", 22), ("RTX 6000 Ada Generation", "40gb", 48),
     ("rtx4090-laptop", "16gb", 16), ("4060ti", "16gb", 16), ("RX 7900 XTX", "24gb", 24)],
)  # fmt: skip
def test_a_card_gives_the_largest_preset_that_needs_no_more(given: str, preset: str, size_gb: int) -> None:
    assert preset_of(given) == (preset, f"--gpu {given}: a card with {size_gb} GB, so the preset is {preset}.")


@pytest.mark.parametrize(
    ("given", "preset"),
    [("12GiB", "12gb"), ("15gb", "12gb"), ("23gb", "16gb"), ("48gb", "40gb"), ("96gb", "80gb"), ("192gb", "80gb")],
)
def test_a_memory_is_rounded_down(given: str, preset: str) -> None:
    assert preset_of(given) == (preset, f"--gpu {given}: rounded down to the preset {preset}.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("8gb", "--gpu '8gb': 8 GB is less than the smallest preset takes. Use --gpu 12gb with a small model"),
        ("rtx3070", "--gpu 'rtx3070': 8 GB is less"),
        ("3060-8gb", "--gpu '3060-8gb': 8 GB is less"),
        ("h100-40gb", "this card has 80 GB or 94 GB or 96 GB. Name the memory alone: --gpu 40gb"),
        ("rtx4009", "neither a preset nor a known card. Did you mean '4090'?"),
        ("24", "Did you mean '24gb'?"),
        ("16g", "Did you mean '16gb'?"),
        ("", "neither a preset nor a known card."),
        ("warp-drive", "Name its memory (12gb, 16gb, 24gb, 40gb, 80gb or any other), a card such as rtx4090, auto"),
    ],
)
def test_what_is_no_card_is_refused_with_a_way_on(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preset_of(given)
    assert message in str(caught.value)


def test_every_card_of_the_table_is_found_by_its_name_and_each_of_its_sizes() -> None:
    for card, sizes in CARDS_GB.items():
        for size in sizes:
            if size < min(SIZES_GB):
                continue
            preset, line = preset_of(f"{card}-{size}gb")
            assert f"{size} GB" in line and int(preset.removesuffix("gb")) <= size
