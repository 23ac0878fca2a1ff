"""Results of the benchmark, their table, and the machine and versions they belong to."""

from __future__ import annotations

import platform
import statistics
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .inputs import Shape

OURS = "mel_lite"
SCORING, HALF, BOUND = "mel_lite, scoring", "mel_lite, half the rows", "two bare products"
SAMPLED = "mel_lite, KL estimated by the sampled token"
PACKAGES = ("torch", "triton", "trl", "unsloth_zoo", "liger_kernel", "cut_cross_entropy", "mel-lite")


@dataclass(slots=True)
class Result:
    """One contender on one shape."""

    name: str
    times_s: list[float] = field(default_factory=list)
    """Times of forward and backward in hidden; of the forward pass alone for scoring."""
    cpu_times_s: list[float] = field(default_factory=list)
    """CPU seconds of the same passes, over all threads; empty on a GPU. Other processes hardly change them."""
    peak_bytes: int | None = None
    """Peak memory in addition to the inputs, including the gradient of hidden."""
    logp_error: float | None = None
    """Largest |logp - truth| / max(|truth|, 0.01) over the sampled rows; of the KL where that is measured."""
    u_error: float | None = None
    """Relative Frobenius error of d sum(logp) / d hidden, or d sum(kl) / d student, over the sampled rows."""
    problem: str | None = None
    """Reason why the contender was not timed."""

    def quantiles_s(self) -> tuple[float, float, float]:
        """Return the 20th percentile, the median and the 80th percentile of the times."""
        if len(self.times_s) < 2:
            return (self.times_s[0],) * 3
        cuts = statistics.quantiles(self.times_s, n=5, method="inclusive")
        return cuts[0], statistics.median(self.times_s), cuts[3]


def table(shape: Shape, results: list[Result]) -> str:
    """Return one line per contender: median and spread, speed relative to the bare products, memory, errors."""
    median_s = {result.name: result.quantiles_s()[1] for result in results if result.times_s}
    bound_s = median_s.get(BOUND)
    lines = [f"\n{shape}", f"{'':44}{'ms':>9}{'p20-p80':>20}{'x ours':>8}{'% bound':>9}{'peak MiB':>10}"
             f"{'KL err' if shape.operator == 'kl' else 'logp err':>10}{'u err':>10}"]  # fmt: skip
    for result in results:
        if not result.times_s:
            lines.append(f"{result.name:44} not run: {result.problem}")
            continue
        low_s, middle_s, high_s = result.quantiles_s()
        share = f"{100 * bound_s / middle_s:.0f}" if bound_s and result.name not in (SCORING, HALF, SAMPLED) else ""
        lines.append(
            f"{result.name:44}{middle_s * 1e3:9.2f}{f'{low_s * 1e3:.2f}-{high_s * 1e3:.2f}':>20}"
            f"{middle_s / median_s[OURS]:8.2f}{share:>9}{(result.peak_bytes or 0) / 2**20:10.0f}"
            f"{_short(result.logp_error):>10}{_short(result.u_error):>10}"
        )
    return "\n".join(lines)


def _short(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def versions() -> dict[str, str]:
    """Return the versions of the measured packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Return the processor and its threads, or the card with its driver, power limit and clocks."""
    if device.type != "cuda":
        model = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line]
        return {"processor": model[0] if model else platform.processor(), "threads": torch.get_num_threads()}
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"],
            capture_output=True, text=True, check=True, timeout=20,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        answer = ""
    return {"card": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, fields: answer}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
