"""Presets by memory, and the preset of a card that is named."""

from __future__ import annotations

import re

from mel_lite.errors import ConfigError
from mel_lite.text import did_you_mean

SIZES_GB = (12, 16, 24, 40, 80)
GPU_PRESETS = {"cpu": "cpu"} | {f"{size}gb": f"gpu-{size}gb" for size in SIZES_GB}
"""`--gpu` value -> file in `mel_lite/configs/`."""
CARDS_GB: dict[str, tuple[int, ...]] = {
    "1080ti": (11,), "2060": (6, 12), "2070": (8,), "2080": (8,), "2080ti": (11, 22), "3050": (8,), "3060": (12, 8),
    "3060ti": (8,), "3070": (8,), "3070ti": (8,), "3080": (10, 12), "3080ti": (12,), "3090": (24,), "3090ti": (24,),
    "3080laptop": (8, 16), "4050laptop": (6,), "4060": (8,), "4060laptop": (8,), "4060ti": (16, 8), "4070": (12,),
    "4070laptop": (8,), "4070super": (12,), "4070ti": (12,), "4070tisuper": (16,), "4080": (16,), "4080laptop": (12,),
    "4080super": (16,), "4090": (24, 48), "4090d": (24, 48), "4090laptop": (16,), "5060": (8,), "5060ti": (16, 8),
    "5070": (12,), "5070ti": (16,), "5080": (16,), "5080laptop": (16,), "5090": (32,), "5090laptop": (24,),
    "titan": (24,), "titanv": (12,), "titanxp": (12,), "a2": (16,), "a10": (24,), "a10g": (24,), "a16": (16,),
    "a30": (24,), "a40": (48,), "a100": (40, 80), "a800": (80, 40), "a2000": (6, 12), "a4000": (16,), "a4500": (20,),
    "a5000": (24,), "a5500": (24,), "a6000": (48,), "2000ada": (16,), "4000ada": (20,), "4500ada": (24,),
    "5000ada": (32,), "6000ada": (48,), "pro6000": (96,), "l4": (24,), "l40": (48,), "l40s": (48,), "p4": (8,),
    "p40": (24,), "p100": (16, 12), "t4": (16,), "t4g": (16,), "v100": (16, 32), "v100s": (32,), "h20": (96, 141),
    "h100": (80, 94, 96), "h200": (141,), "h800": (80,), "gh200": (96, 144), "b200": (180, 192), "b300": (288, 270),
    "gb10": (128,), "7900xt": (20,), "7900xtx": (24,), "mi210": (64,), "mi300x": (192,),
}  # fmt: skip
"""Memory of common cards by their names in lower case without maker, series and separators. The first size is meant
when none is named: the smallest, except where the smallest is rare."""
CPU_BUDGET = re.compile(r"cpu[-_:]?(\d{1,4})gb")
"""A `--gpu` value that states the memory of a run on the CPU."""
MAKERS = r"nvidia|geforce|quadro|tesla|radeon|amd|rtx|gtx|rx|sxm\d?|pcie|nvl|gpu|generation|hbm\de?|[\s_-]"


def preset_of(name: str) -> tuple[str, str]:
    """Return the preset that a `--gpu` value means, and a line about the choice; empty for a preset's own name.

    A preset, `auto` and `cpu` are themselves. A card (`rtx4090`, `a100-80gb`) and a memory (`48gb`) give the largest
    preset that needs no more.

    Raises: ConfigError for an unknown card, a card in a size it is not made in, and memory below every preset.
    """
    lower = name.lower().strip()
    if lower in GPU_PRESETS or lower == "auto":
        return lower, ""
    if cpu_budget_bytes(lower) is not None:
        return "cpu", ""
    card = re.sub(MAKERS, "", lower)
    known, size_gb = _card(card)
    if known is not None and size_gb not in CARDS_GB[known]:
        sizes = " or ".join(f"{size} GB" for size in CARDS_GB[known])
        raise ConfigError(f"--gpu {name!r}: this card has {sizes}. Name the memory alone: --gpu {size_gb}gb.")
    if size_gb is None:
        raise ConfigError(f"--gpu {name!r} is neither a preset nor a known card.{_suggestion(card)}")
    fitting = [size for size in SIZES_GB if size <= size_gb]
    if not fitting:
        raise ConfigError(
            f"--gpu {name!r}: {size_gb} GB is less than the smallest preset takes. Use --gpu {SIZES_GB[0]}gb with a "
            "small model (--model Qwen/Qwen3-0.6B-Base), or --gpu auto to plan for the card that is here."
        )
    preset = f"{fitting[-1]}gb"
    if known is None:
        return preset, f"--gpu {name}: rounded down to the preset {preset}."
    return preset, f"--gpu {name}: a card with {size_gb} GB, so the preset is {preset}."


def cpu_budget_bytes(name: str) -> int | None:
    """Return the memory that a `--gpu` value such as `cpu-4gb` states, in GB of 10^9 bytes; None for any other."""
    stated = CPU_BUDGET.fullmatch(name.lower().strip())
    return None if stated is None else int(stated[1]) * 10**9


def _card(text: str) -> tuple[str | None, int | None]:
    """Return the known card and the memory in GB that `text` names; None for what it does not name."""
    if (only_size := re.fullmatch(r"(\d{1,3})gi?b", text)) is not None:
        return None, int(only_size[1])
    if text in CARDS_GB:
        return text, CARDS_GB[text][0]
    for card in sorted(CARDS_GB, key=len, reverse=True):
        size = re.fullmatch(rf"{card}([1-9]\d{{0,2}})gi?b", text)
        if size is not None:
            return card, int(size[1])
    return None, None


def _suggestion(card: str) -> str:
    """Return the nearest known names, and what can be named in any case."""
    number = re.fullmatch(r"(\d{1,3})(g|gi)?", card)
    near = f" Did you mean '{number[1]}gb'?" if number else did_you_mean(card, [*CARDS_GB, *GPU_PRESETS, "auto"])
    sizes = ", ".join(f"{size}gb" for size in SIZES_GB)
    return f"{near} Name its memory ({sizes} or any other), a card such as rtx4090, auto, or cpu."
