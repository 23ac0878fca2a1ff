"""Packages that load when they are used, and what the start of a run loads."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import model as lora_model
from torch import nn

from mel_lite import deferred
from mel_lite.deferred import building_plain_layers, deferring

UNUSED = ("bitsandbytes", "networkx", "torch._inductor.compile_fx", "trackio", "mlflow", "matplotlib", "textual")
"""Packages that take up to two CPU seconds to import, and that a run without them does not need."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the package `slow_package` on the path; return the list to which each of its imports adds a line."""
    folder = tmp_path / "slow_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("import sys\nsys.slow_imports.append(__name__)\nANSWER = 42\n")
    (folder / "part.py").write_text("from slow_package import ANSWER\nTWICE = 2 * ANSWER\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    imports: list[str] = []
    monkeypatch.setattr(sys, "slow_imports", imports, raising=False)
    for name in ("slow_package", "slow_package.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return imports


def test_a_package_loads_when_a_name_in_it_is_used(package: list[str]) -> None:
    with deferring(["slow_package"]):
        module: Any = importlib.import_module("slow_package")
        assert importlib.util.find_spec("slow_package") is not None
        assert inspect.getmodule(test_a_package_loads_when_a_name_in_it_is_used) is sys.modules[__name__]
        assert package == []
    assert "slow_package" not in sys.modules, "an import outside the block is an ordinary one"
    assert module.ANSWER == 42 and package == ["slow_package"]
    assert sys.modules["slow_package"].ANSWER == module.ANSWER and module.ANSWER == 42
    assert package == ["slow_package"], "it is imported once"


def test_a_part_of_a_package_loads_inside_the_block(package: list[str]) -> None:
    with deferring(["slow_package"]):
        assert importlib.import_module("slow_package.part").TWICE == 84
        with pytest.raises(AttributeError, match="no attribute 'other'"):
            importlib.import_module("slow_package").other  # noqa: B018
    assert package == ["slow_package"] and sys.modules["slow_package"].ANSWER == 42


def test_what_is_loaded_or_not_installed_stays_as_it_is(package: list[str]) -> None:
    loaded = importlib.import_module("slow_package")
    with deferring(["slow_package", "not_installed_at_all"]):
        assert importlib.import_module("slow_package") is loaded
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("not_installed_at_all")
    assert sys.modules["slow_package"] is loaded


def test_the_packages_of_all_distributions_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.packages_distributions()
    scans: list[int] = []
    scan = functools.cache(lambda: scans.append(1) or found)
    monkeypatch.setattr(deferred, "_scan", scan)
    for _ in range(2):
        with deferring([]):
            mine = importlib.metadata.packages_distributions()
            assert mine == found and "torch" in mine
            mine["torch"].clear()  # a reader's own copy
    assert scans == [1] and importlib.metadata.packages_distributions is not deferred._distributions


def test_no_garbage_is_collected_inside_the_block() -> None:
    was = gc.isenabled()
    try:
        for state, switch in ((True, gc.enable), (False, gc.disable)):
            switch()
            with pytest.raises(ZeroDivisionError), deferring([]):
                assert not gc.isenabled()
                1 / 0  # noqa: B018
            assert gc.isenabled() is state
    finally:
        (gc.enable if was else gc.disable)()


def test_a_lora_layer_is_built_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another LoRA layer must come out as before, and PEFT must answer as before after the block."""
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    asks = lora_model.is_bnb_available, lora_model.is_bnb_4bit_available

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

    with building_plain_layers():
        assert not lora_model.is_bnb_available() and not lora_model.is_bnb_4bit_available()
        built = get_peft_model(Small(), LoraConfig(r=2, target_modules=["proj"]))  # type: ignore[arg-type]
        quantizer = importlib.util.module_from_spec(ModuleSpec("bitsandbytes", None))
        monkeypatch.setitem(sys.modules, "bitsandbytes", quantizer)
        assert lora_model.is_bnb_available(), "a model quantized inside the block has loaded it"
    assert type(built.base_model.model.proj).__module__ == "peft.tuners.lora.layer"  # type: ignore[union-attr]
    assert asks == (lora_model.is_bnb_available, lora_model.is_bnb_4bit_available)


LOADED = """
import json, sys
from mel_lite.cli.shared import loading
with loading("loading"):
    import mel_lite.run.train
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.slow
def test_a_run_starts_without_packages_that_it_does_not_use() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"trl.trainer.grpo_trainer", "peft.tuners.lora.model"} <= loaded
    assert not loaded & set(UNUSED)
