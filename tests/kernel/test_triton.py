"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for cards that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is installed with the development requirements")

from mel_lite.kernels import offline

HERE = Path(__file__).parent
ARCHITECTURES = offline.ARCHITECTURES
MAX_SHARED_BYTES = 99 * 1024
OPERANDS = {75: ("fp16", "fp32")}
"""No bfloat16 products before sm_80."""


def test_the_kernels_pass_the_operators_tests_in_the_interpreter() -> None:
    """Every test of the operator that has an implementation to choose, in float32 and float16 (the interpreter's
    bfloat16 is broken). The variable must be set before Triton is imported, hence a process of its own."""
    files = [str(HERE / f"test_{name}.py") for name in ("exactness", "operator", "mel_loss")]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) > 100 and "skipped" not in ran.stdout


def check(usage: offline.Usage) -> None:
    assert usage.stack_bytes == 0, f"spills registers: {usage}"
    assert usage.shared_bytes < MAX_SHARED_BYTES, usage
    assert 0 < usage.registers <= 255


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiles_fit_in_registers(architecture: int) -> None:
    """The widest tiles of each kind, whole and ragged; whole ones are read 16 bytes at a time."""
    for operand in OPERANDS.get(architecture, ("bf16", "fp16", "fp32")):
        for block in (8192, 16384):
            usage = offline.fold_usage(architecture, operand, block=block)
            check(usage)
            threads = 32 * block // 1024
            assert usage.wide_loads >= block // threads // 4
    check(offline.fold_usage(architecture, "fp16", block=16384, bias=True, ragged=True))
    check(offline.fold_usage(architecture, "fp16", block=8192, bias=True, cap=True))
    check(offline.fold_usage(architecture, "fp16", block=8192, bias=True, cap=True, ragged=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_row_kernels_fit_in_registers(architecture: int) -> None:
    for cap in (False, True):
        check(offline.finish_usage(architecture, cap=cap))
    for operand in OPERANDS.get(architecture, ("bf16", "fp16", "fp32")):
        check(offline.direction_usage(architecture, operand))


def test_a_kernel_that_spills_is_seen() -> None:
    """The check above can fail: a capped row of 16384 columns does not fit, which is why its tiles are narrower."""
    assert offline.fold_usage(90, "fp16", block=16384, bias=True, cap=True).stack_bytes > 0
