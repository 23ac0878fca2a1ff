"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for several architectures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is installed with the development requirements")

import compiled_kernels
from mel_lite.kernels.triton_steps import MAX_PAIR_BLOCK

HERE = Path(__file__).parent
ARCHITECTURES = compiled_kernels.ARCHITECTURES
MAX_SHARED_BYTES = 99 * 1024
OPERANDS = {75: ("fp16", "fp32")}
"""Operand dtypes of architectures without bfloat16 products."""


def run_interpreted(expression: str, at_least: int) -> None:
    """Run the operator tests on the Triton kernels, in a process where TRITON_INTERPRET is set before the import."""
    files = [str(HERE / f"test_{name}.py") for name in ("exactness", "operator", "kl_exactness", "kl")]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", expression, "-p", "no:cacheprovider", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) >= at_least and "skipped" not in ran.stdout, ran.stdout[-4000:]


@pytest.mark.slow
def test_interpreted_kernels_are_exact() -> None:
    """Many small tiles, in float32 and float16 (the interpreter's bfloat16 is broken)."""
    run_interpreted("triton and (tile_sizes and tiling1 or sums_move)", 7)


@pytest.mark.slow
def test_interpreted_kernels_pass_all_tests_of_the_operator() -> None:
    run_interpreted("triton", 191)


def check(usage: compiled_kernels.Usage) -> None:
    assert usage.stack_bytes == 0, f"spills registers: {usage}"
    assert usage.shared_bytes < MAX_SHARED_BYTES, usage
    assert 0 < usage.registers <= 255


@pytest.mark.parametrize(
    "architecture", [75, 90, *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a not in (75, 90))]
)
@pytest.mark.parametrize("block", [8192, 16384])
def test_tiles_fit_in_registers(architecture: int, block: int) -> None:
    """Without options, with all of them, and for a ragged tile; whole tiles are read 16 bytes at a time."""
    for operand in OPERANDS.get(architecture, ("bf16", "fp16", "fp32")):
        plain = compiled_kernels.fold_usage(architecture, operand, block=block)
        check(plain)
        assert plain.wide_loads >= 8192 // 256 // 4
        check(compiled_kernels.fold_usage(architecture, operand, block=block, bias=True, cap=True))
        check(compiled_kernels.fold_usage(architecture, operand, block=block, bias=True, cap=True, ragged=True))


@pytest.mark.parametrize(
    "architecture", [75, 90, *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES if a not in (75, 90))]
)
def test_pairs_of_tiles_fit_in_registers(architecture: int) -> None:
    """A program holds both rows of a pair; whole tiles are read 16 bytes at a time."""
    for operand in OPERANDS.get(architecture, ("bf16", "fp16", "fp32")):
        plain = compiled_kernels.fold_pairs_usage(architecture, operand)
        check(plain)
        assert plain.wide_loads >= 2 * MAX_PAIR_BLOCK // 512 // 4
        check(compiled_kernels.fold_pairs_usage(architecture, operand, bias=True, cap=True))
        check(compiled_kernels.fold_pairs_usage(architecture, operand, bias=True, cap=True, ragged=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_kernels_fit_in_registers(architecture: int) -> None:
    for cap in (False, True):
        check(compiled_kernels.finish_usage(architecture, cap=cap))
    check(compiled_kernels.finish_pairs_usage(architecture))
    for operand in OPERANDS.get(architecture, ("bf16", "fp16", "fp32")):
        check(compiled_kernels.direction_usage(architecture, operand))
        check(compiled_kernels.direction_usage(architecture, operand, pairs=True))


def test_a_kernel_that_spills_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail: with 2 warps, a row of 8192 columns does not fit in registers."""
    options = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
    monkeypatch.setattr(compiled_kernels, "fold_options", lambda block: options)
    assert compiled_kernels.fold_usage(90, "fp16", block=8192).stack_bytes > 0
