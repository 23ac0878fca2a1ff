"""Peak memory since the process began, for the metrics of a step."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from mel_lite.memory.formulas import GIB


def peak_metrics() -> dict[str, float]:
    """Return `mel/peak_memory_gib`: the peak since the process began, of the GPU or of this process's RSS.

    On a GPU it is what is in use on the device, by any program, plus what PyTorch's allocator held above that at its
    peak. Reads counters only and resets none. Empty where the system does not tell.
    """
    if torch.cuda.is_available():
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        above_now = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
        return {"mel/peak_memory_gib": (total_bytes - free_bytes + above_now) / GIB}
    peak_bytes = peak_rss_bytes()
    return {"mel/peak_memory_gib": peak_bytes / GIB} if peak_bytes else {}


def peak_rss_bytes() -> int:
    """Return this process's peak RSS, from Linux' /proc; 0 elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
