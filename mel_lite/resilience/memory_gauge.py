"""Peak memory: of the GPU, or this process's RSS."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from mel_lite.memory.formulas import CONTEXT_BYTES
from mel_lite.training.metrics import peak_rss_bytes


class Gauge(Protocol):
    """Measures the peak memory since `start`."""

    def start(self) -> None: ...

    def peak_bytes(self) -> int: ...


class GpuGauge:
    """GPU memory that this process uses, whatever allocated it.

    The peak is the memory in use on the device now plus what PyTorch's allocator held above that at its peak. The
    allocator's figures alone are not enough, since it keeps counting vLLM's cache while that sleeps. Memory in use when
    the gauge is made belongs to other programs and to the CUDA context, for which the planner has an allowance. Make
    the gauge before a model is loaded.
    """

    def __init__(self) -> None:
        some = torch.ones(64, 64, device="cuda")
        (some @ some).sum().item()  # loads cuBLAS, which is in the allowance
        del some
        torch.cuda.empty_cache()
        self._before_bytes = self._used_bytes()

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        torch.cuda.synchronize()
        above_now = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
        return self._used_bytes() - self._before_bytes + above_now + CONTEXT_BYTES

    @staticmethod
    def _used_bytes() -> int:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return total_bytes - free_bytes


class HostGauge:
    """Peak RSS of this process, from Linux' /proc; 0 elsewhere."""

    def start(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def peak_bytes(self) -> int:
        return peak_rss_bytes()


def gauge_here() -> Gauge:
    """Return the gauge for the device that trains."""
    return GpuGauge() if torch.cuda.is_available() else HostGauge()
