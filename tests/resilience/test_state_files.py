"""States as JSON and safetensors: what is read is what was written, bit for bit, and nothing else is read."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mel_lite.errors import CheckpointError
from mel_lite.resilience.state_files import dump, load, pickles, rng_state, set_rng_state


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types, NaN equal to NaN, tensors and arrays bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(-1), b.contiguous().view(-1))
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


TENSORS = st.builds(
    lambda shape, dtype, seed: torch.empty(shape, dtype=dtype).random_(
        0, 100, generator=torch.Generator().manual_seed(seed)
    ),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float64]),
    st.integers(0, 99),
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | TENSORS
KEYS = st.integers() | st.text()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES)
def test_any_tree_comes_back(tmp_path: Path, tree: Any) -> None:
    for old in tmp_path.glob("state.*"):
        old.unlink()
    dump(tmp_path / "state", tree)
    assert same(load(tmp_path / "state"), tree)


def test_the_state_of_an_eight_bit_optimizer_comes_back(tmp_path: Path) -> None:
    """bitsandbytes nests a dict in each weight's state, and all of them share one table."""
    table = torch.linspace(-1, 1, 256)
    state = {
        "state": {
            i: {
                "step": 3,
                "__bnb_optimizer_quant_state__": {"qmap1": table, "state1": torch.full((8, 8), i, dtype=torch.uint8)},
                "view": torch.arange(12.0).view(3, 4).t(),
            }
            for i in range(3)
        },
        "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1, 2], "foreach": None}],
    }
    dump(tmp_path / "optimizer", state)
    loaded = load(tmp_path / "optimizer")
    assert same(loaded, state)
    assert (tmp_path / "optimizer.safetensors").stat().st_size < 2 * 256 * 4 + 1500, "the shared table is written once"


def test_random_number_generators_continue_from_the_saved_state(tmp_path: Path) -> None:
    dump(tmp_path / "rng_state", rng_state(all_gpus=False))

    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(()).item()

    expected = draw()
    assert draw() != expected
    set_rng_state(load(tmp_path / "rng_state"))
    assert draw() == expected


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", len])
def test_what_has_no_plain_form_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="cannot be stored in a state file"):
        dump(tmp_path / "state", {"x": value})


@pytest.mark.parametrize(
    "text", ["", "{", '{"__kind__": "code", "text": "1"}', '{"a": 1}', '{"__kind__": "tensor", "name": "t9"}']
)
def test_a_garbled_file_is_a_checkpoint_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state.json cannot be read"):
        load(tmp_path / "state")
    with pytest.raises(CheckpointError, match=r"missing.json cannot be read"):
        load(tmp_path / "missing")


def test_pickles_are_found_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    names = ["optimizer.pt", "rng_state_3.pth", "pytorch_model-00001-of-00002.bin", "other/adapter_model.bin"]
    for name in [*names, "model.safetensors", "optimizer.safetensors", "notes.txt"]:
        (tmp_path / name).touch()
    assert pickles(tmp_path) == sorted(names)
