"""The benchmark of the operator: times, errors and memory beside those of everyone else, in one interleaved run.

N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .api import fused_logprobs
from .peers import PEERS, Peer
from .truth import true_head

OURS = "mel_lite"
SCORING, HALF, BOUND = "mel_lite, scoring", "mel_lite, half the rows", "two bare products"
SAMPLE_ROWS = 128
"""Rows whose float64 truth is computed; enough for a Frobenius error, few enough for a card without fast float64."""
FLUSH_BYTES = 256 * 2**20
PACKAGES = ("torch", "triton", "trl", "unsloth_zoo", "liger_kernel", "cut_cross_entropy", "mel-lite")


@dataclass(frozen=True, slots=True)
class Shape:
    """One problem: rows, hidden size, vocabulary and dtype."""

    rows: int
    width: int
    vocab: int
    dtype: str
    states: str = "synthetic"
    """Where hidden states, head and targets come from: `model_like`, or the model of that name."""

    def __str__(self) -> str:
        return f"N {self.rows}, H {self.width}, V {self.vocab}, {self.dtype}, {self.states} states"


Inputs = tuple[Tensor, Tensor, Tensor]
"""(hidden_NH, weight_VH, target_N)."""


@dataclass(slots=True)
class Result:
    """One contender on one shape. Times are of forward and backward in hidden (forward only for scoring)."""

    name: str
    times_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    """Most memory above what the inputs take; the gradient of hidden is in it."""
    logp_error: float | None = None
    """Largest |logp - truth| / max(|truth|, 0.01) over the sampled rows."""
    u_error: float | None = None
    """Relative Frobenius error of d sum(logp) / d hidden over the sampled rows."""
    problem: str | None = None

    def quantiles_s(self) -> tuple[float, float, float]:
        """20th percentile, median, 80th percentile."""
        if len(self.times_s) < 2:
            return (self.times_s[0],) * 3
        cuts = statistics.quantiles(self.times_s, n=5, method="inclusive")
        return cuts[0], statistics.median(self.times_s), cuts[3]


def default_shapes(device: torch.device) -> list[Shape]:
    """The shapes of models people train: 8B, 4B, 0.5B, and the demo's 135M; the last alone on a CPU."""
    if device.type == "cpu":
        return [Shape(8192, 576, 49152, "float32")]
    dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    return [Shape(8192, width, vocab, dtype) for width, vocab in
            ((4096, 151936), (2560, 151936), (896, 151936), (576, 49152))]  # fmt: skip


def run(
    device: str | None = None,
    *,
    shapes: list[Shape] | None = None,
    given: Mapping[Shape, Inputs] | None = None,
    rounds: int | None = None,
    json_path: Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure every contender on every shape, write the raw numbers to `json_path` and log a table.

    Contenders of a shape take turns, in an order that rotates; a round gives one time each. `given` are further shapes
    with their inputs, such as the hidden states of a real model.

    Returns: what the JSON file holds: machine, versions, and per shape the results with all their times.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rounds = rounds or (3 if where.type == "cpu" else 15)
    report: dict[str, Any] = {"machine": machine(where), "versions": versions(), "rounds": rounds, "shapes": []}
    log(", ".join(f"{k} {v}" for k, v in (report["machine"] | report["versions"]).items()))
    given = given or {}
    for shape in [*(default_shapes(where) if shapes is None else shapes), *given]:
        results = measure(shape, where, rounds, given.get(shape))
        report["shapes"].append(asdict(shape) | {"results": [asdict(result) for result in results]})
        log(table(shape, results))
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def model_like(shape: Shape, device: torch.device, *, seed: int = 0) -> Inputs:
    """(hidden_NH, weight_VH, target_N) whose distributions look like a language model's on its own samples.

    Logits of the bulk are about N(0, 2); a few candidates per row stand out by steps, from hardly to overwhelmingly, so
    that about half the rows are decided (p > 0.9) and a tenth are open. Speed depends on that where contenders filter
    by probability, and through the chip's power.
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)
    weight_VH = torch.randn(shape.vocab, shape.width, device=device, generator=generator)
    rows, candidates = shape.rows, 8
    hidden_NH = torch.randn(rows, shape.width, device=device, generator=generator) * (2.0 / shape.width**0.5)
    picked_NC = torch.randint(shape.vocab, (rows, candidates), device=device, generator=generator)
    lead_N = 4.0 + 24.0 * torch.rand(rows, device=device, generator=generator)
    for rank in range(candidates):
        direction_NH = weight_VH[picked_NC[:, rank]]
        lift_N = lead_N * 0.8**rank / direction_NH.square().sum(1)
        hidden_NH += lift_N[:, None] * direction_NH
    choice_N1 = torch.rand(rows, 1, device=device, generator=generator).pow(3).mul(candidates).long()
    target_N = picked_NC.gather(1, choice_N1)[:, 0]
    return hidden_NH.to(dtype).requires_grad_(), weight_VH.to(dtype), target_N


def contenders(inputs: Inputs) -> dict[str, Callable[[], Tensor | None] | str]:
    """Name -> one whole pass, which leaves the gradient in hidden.grad; or why there is none."""
    hidden_NH, weight_VH, target_N = inputs
    rows = torch.arange(len(target_N), device=target_N.device)

    def train(peer: Peer) -> Callable[[], Tensor]:
        def once() -> Tensor:
            output = peer(hidden_NH, weight_VH, target_N)
            output.sum().backward()
            return output.detach()

        return once

    def score() -> Tensor:
        return fused_logprobs(hidden_NH, weight_VH, target_N, compute_u=False)[0]

    found: dict[str, Callable[[], Tensor | None] | str] = {
        OURS: train(lambda h, w, t: fused_logprobs(h, w, t)[0]),
        SCORING: score,
        HALF: train(lambda h, w, t: fused_logprobs(h, w, t, keep_N=rows % 2 == 0)[0]),
        BOUND: _bare_products(hidden_NH.detach(), weight_VH),
    }
    for name, get in PEERS.items():
        try:
            found[name] = train(get())
        except Exception as error:  # whatever an absent or broken package raises on import
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _bare_products(hidden_NH: Tensor, weight_VH: Tensor) -> Callable[[], None]:
    """hidden @ weight.T and (that) @ weight, whole, by the BLAS library, nothing between: 4 N V H operations."""
    z_NV, grad_NH = hidden_NH.new_empty(len(hidden_NH), len(weight_VH)), torch.empty_like(hidden_NH)

    def once() -> None:
        torch.mm(hidden_NH, weight_VH.T, out=z_NV)
        torch.mm(z_NV, weight_VH, out=grad_NH)

    return once


def measure(shape: Shape, device: torch.device, rounds: int, inputs: Inputs | None = None) -> list[Result]:
    """Check every contender once (errors, memory; it also warms up), then time them in turns."""
    if inputs is None:
        inputs = model_like(shape, device)
    hidden_NH, weight_VH, target_N = inputs
    sample = torch.arange(0, shape.rows, max(1, shape.rows // SAMPLE_ROWS), device=device)
    truth = true_head(hidden_NH[sample], weight_VH, target_N[sample])
    results, passes = [], {}
    for name, once in contenders(inputs).items():
        result = Result(name)
        results.append(result)
        if isinstance(once, str):
            result.problem = once
            continue
        try:
            _check(result, once, hidden_NH, sample, truth)
            passes[name] = once
        except Exception as error:  # out of memory, or a peer that does not run on this device
            result.problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        hidden_NH.grad = None
        _collect(device)
    by_name = {result.name: result for result in results}
    order = list(passes)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            hidden_NH.grad = None
            by_name[name].times_s.append(_time_s(passes[name], device))
    return results


def _check(result: Result, once: Callable[[], Tensor | None], hidden_NH: Tensor, sample: Tensor, truth: Any) -> None:
    """Run once to warm up, once more for memory, and compare what came out with the truth."""
    device = hidden_NH.device
    once()
    hidden_NH.grad = None
    _collect(device)
    before = _memory_bytes(device, reset=True)
    output = once()
    result.peak_bytes = _memory_bytes(device) - before
    if output is not None and output.dim() == 1 and result.name != HALF:
        wrong_N = (output[sample].double() - truth.logp_N).abs() / truth.logp_N.abs().clamp(min=0.01)
        result.logp_error = float(wrong_N.max())
    if hidden_NH.grad is not None and result.name != HALF:
        wrong_NH = hidden_NH.grad[sample].double() - truth.u_NH
        result.u_error = float(wrong_NH.norm() / truth.u_NH.norm())


def _collect(device: torch.device) -> None:
    """Give freed memory back, so that the next peak counts all that a contender takes."""
    gc.collect()
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _memory_bytes(device: torch.device, *, reset: bool = False) -> int:
    """Peak of the allocator on a GPU, of the process on a CPU (Linux), since the last reset; at a reset, now."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _time_s(once: Callable[[], Any], device: torch.device) -> float:
    """One pass; on a GPU by events, after emptying the cache."""
    if device.type != "cuda":
        start_s = time.perf_counter()
        once()
        return time.perf_counter() - start_s
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def table(shape: Shape, results: list[Result]) -> str:
    """One line per contender: median and spread, share of the bare products' speed, memory, errors."""
    median_s = {result.name: result.quantiles_s()[1] for result in results if result.times_s}
    bound_s = median_s.get(BOUND)
    lines = [f"\n{shape}", f"{'':28}{'ms':>9}{'p20-p80':>16}{'x ours':>8}{'% bound':>9}{'peak MiB':>10}"
             f"{'logp err':>10}{'u err':>10}"]  # fmt: skip
    for result in results:
        if not result.times_s:
            lines.append(f"{result.name:28} not run: {result.problem}")
            continue
        low_s, middle_s, high_s = result.quantiles_s()
        share = f"{100 * bound_s / middle_s:.0f}" if bound_s and result.name not in (SCORING, HALF) else ""
        lines.append(
            f"{result.name:28}{middle_s * 1e3:9.2f}{f'{low_s * 1e3:.2f}-{high_s * 1e3:.2f}':>16}"
            f"{middle_s / median_s[OURS]:8.2f}{share:>9}{(result.peak_bytes or 0) / 2**20:10.0f}"
            f"{_short(result.logp_error):>10}{_short(result.u_error):>10}"
        )
    return "\n".join(lines)


def _short(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def versions() -> dict[str, str]:
    """Versions of what is measured, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to: processor or card, its driver, power limit and clocks."""
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
