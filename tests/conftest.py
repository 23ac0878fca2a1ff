"""What every test needs before torch is imported: pinned threads, no network, caches outside the user's home."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile

import pytest

# Sums over threads depend on how many there are: bit-exact tests need the same number everywhere.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

# Nothing in the tests may go to a network; a test that tries should fail at once, not time out.
for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[variable] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_cache = tempfile.mkdtemp(prefix="mel-lite-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["HF_DATASETS_CACHE"] = _cache

# Tables and help pages must not depend on the terminal the tests run in.
os.environ["COLUMNS"] = "120"
for variable in ("FORCE_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(variable, None)

# The modules that all tests import are hundreds of thousands of objects. The collector looks at them once, after the
# tests have been collected, and not again: that was a quarter of the time of a test that trains.
gc.disable()


def pytest_collection_finish() -> None:
    """Take everything imported so far out of the garbage collector's sight, and switch it on."""
    gc.collect()
    gc.freeze()
    gc.enable()


LONGEST = (
    "integration/test_end_to_end.py",
    "integration/test_notebooks.py",
    "engines/test_vllm.py",
    "engines/test_unsloth.py",
    "benchmarks/test_gpu.py",
    "memory/test_formulas.py",
)
"""They come first, so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the rest stays as it was collected."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get("/".join(item.path.parts[-2:]), len(LONGEST)))
