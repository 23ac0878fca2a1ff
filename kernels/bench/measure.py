"""Measure every contender: times in turns, errors against float64, peak memory.

N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import fused_logprobs
from ..kl import fused_kl
from .inputs import Inputs, Shape, default_shapes, model_like
from .peers import KL_PEERS, PEERS, Peer
from .report import BOUND, HALF, OURS, SAMPLED, SCORING, Result, machine, table, versions
from .truth import true_head, true_kl

SAMPLE_ROWS = 128
"""Rows that are compared with float64: enough for a Frobenius error, few enough for a card with slow float64."""
FLUSH_BYTES = 256 * 2**20
"""Bytes that are written before each timed pass on a GPU; more than any L2 cache."""


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

    The contenders of a shape take turns in an order that rotates. Each round gives one time per contender.

    Args:
        given: further shapes with their inputs, such as the hidden states of a real model.

    Returns: the content of the JSON file: machine, versions, and per shape the results with all their times.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rounds = rounds or (3 if where.type == "cpu" else 15)
    report: dict[str, Any] = {"machine": machine(where), "versions": versions(), "rounds": rounds, "shapes": []}
    log(", ".join(f"{k} {v}" for k, v in (report["machine"] | report["versions"]).items()))
    given = given or {}
    frozen_before = gc.get_freeze_count() > 0
    for shape in [*(default_shapes(where) if shapes is None else shapes), *given]:
        try:
            results = measure(shape, where, rounds, given.get(shape))
        finally:
            if not frozen_before:
                gc.unfreeze()
        report["shapes"].append(asdict(shape) | {"results": [asdict(result) for result in results]})
        log(table(shape, results))
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(report, indent=1) + "\n")
    return report


def contenders(inputs: Inputs, operator: str = "logprobs") -> dict[str, Callable[[], Tensor | None] | str]:
    """Map each name to a function that runs one pass and leaves the gradient in hidden.grad, or to an error."""
    hidden_NH, weight_VH, other = inputs
    rows = torch.arange(len(hidden_NH), device=hidden_NH.device)

    def ours(hidden_NH: Tensor, weight_VH: Tensor, other: Tensor, **options: Any) -> Tensor:
        if operator == "kl":
            return fused_kl(hidden_NH, other, weight_VH, **options)
        return fused_logprobs(hidden_NH, weight_VH, other, **options)[0]

    def train(peer: Peer) -> Callable[[], Tensor]:
        def once() -> Tensor:
            output = peer(hidden_NH, weight_VH, other)
            output.sum().backward()
            return output.detach()

        return once

    multiplied = torch.cat([hidden_NH.detach(), other]) if operator == "kl" else hidden_NH.detach()
    found: dict[str, Callable[[], Tensor | None] | str] = {
        OURS: train(ours),
        SCORING: lambda: ours(hidden_NH, weight_VH, other, compute_u=False),
        HALF: train(lambda h, w, t: ours(h, w, t, keep_N=rows % 2 == 0)),
        BOUND: _bare_products(multiplied, weight_VH),
    }
    if operator == "kl":
        token_N = torch.randint(len(weight_VH), rows.shape, generator=torch.Generator().manual_seed(0)).to(rows.device)
        found[SAMPLED] = train(
            lambda student_NH, weight_VH, teacher_NH: (
                fused_logprobs(student_NH, weight_VH, token_N)[0]
                - fused_logprobs(teacher_NH, weight_VH, token_N, compute_u=False)[0]
            )
        )
    for name, get in (KL_PEERS if operator == "kl" else PEERS).items():
        try:
            found[name] = train(get())
        except Exception as error:  # whatever an absent or broken package raises on import
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _bare_products(hidden_NH: Tensor, weight_VH: Tensor) -> Callable[[], None]:
    """Multiply hidden @ weight.T and (that) @ weight, whole, by the BLAS library: a lower bound.

    4 N V H operations; twice as many rows, and operations, for a KL divergence.
    """
    z_NV, grad_NH = hidden_NH.new_empty(len(hidden_NH), len(weight_VH)), torch.empty_like(hidden_NH)

    def once() -> None:
        torch.mm(hidden_NH, weight_VH.T, out=z_NV)
        torch.mm(z_NV, weight_VH, out=grad_NH)

    return once


def measure(shape: Shape, device: torch.device, rounds: int, inputs: Inputs | None = None) -> list[Result]:
    """Check every contender once (errors, memory; this also warms it up), then time all of them in turns."""
    if inputs is None:
        inputs = model_like(shape, device)
    hidden_NH, weight_VH, other = inputs
    sample = torch.arange(0, shape.rows, max(1, shape.rows // SAMPLE_ROWS), device=device)
    truth: Any
    if shape.operator == "kl":
        truth = true_kl(hidden_NH[sample], other[sample], weight_VH)
    else:
        truth = true_head(hidden_NH[sample], weight_VH, other[sample])
    results, passes = [], {}
    for name, once in contenders(inputs, shape.operator).items():
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
            wall_s, cpu_s = _times_s(passes[name], device)
            by_name[name].times_s.append(wall_s)
            if cpu_s is not None:
                by_name[name].cpu_times_s.append(cpu_s)
    return results


def _check(result: Result, once: Callable[[], Tensor | None], hidden_NH: Tensor, sample: Tensor, truth: Any) -> None:
    """Run once to warm up, run again to measure memory, and compare the output with the truth."""
    device = hidden_NH.device
    once()
    hidden_NH.grad = None
    _collect(device)
    before = _memory_bytes(device, reset=True)
    output = once()
    result.peak_bytes = _memory_bytes(device) - before
    if output is not None and output.dim() == 1 and result.name not in (HALF, SAMPLED):
        wrong_N = (output[sample].double() - truth[0]).abs() / truth[0].abs().clamp(min=0.01)
        result.logp_error = float(wrong_N.max())
    if hidden_NH.grad is not None and result.name not in (HALF, SAMPLED):
        wrong_NH = hidden_NH.grad[sample].double() - truth.u_NH
        result.u_error = float(wrong_NH.norm() / truth.u_NH.norm())


def _collect(device: torch.device) -> None:
    """Return freed memory to the system, so that the next peak counts everything a contender allocates.

    Surviving objects are frozen until the end of `run`: visiting all modules in every collection takes half a second.
    """
    gc.collect()
    gc.freeze()
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _memory_bytes(device: torch.device, *, reset: bool = False) -> int:
    """Return the peak since the last reset; right after a reset, the current memory.

    It is the peak of PyTorch's allocator on a GPU, and the peak RSS of the process on a CPU (Linux only, else 0).
    """
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


def _times_s(once: Callable[[], Any], device: torch.device) -> tuple[float, float | None]:
    """Return wall and CPU seconds of one pass. A GPU is timed by events, after flushing its cache; then no CPU time."""
    if device.type != "cuda":
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        once()
        return time.perf_counter() - start_s, time.process_time() - start_cpu_s
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    once()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, None
