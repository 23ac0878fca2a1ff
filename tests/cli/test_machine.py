"""Facts about a machine are read from it, each without a crash."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from mel_lite.cli import machine
from tiny_models import save_tiny, tiny_config


def test_the_compiled_caches_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNSLOTH_COMPILE_LOCATION", raising=False)
    assert machine._compiled_cache() is None
    folder = tmp_path / machine.COMPILED_CACHE
    folder.mkdir()
    assert machine._compiled_cache() is None, "an empty folder holds nothing stale"
    (folder / "UnslothGRPOTrainer.py").write_text(
        '"""\n2026.10.9\n2026.10.6\n5.17.0\n1.15.0\n__UNSLOTH_VERSIONING__\n"""\n'
    )
    assert machine._compiled_cache() == folder
    assert machine._compiled_for(folder) == ("2026.10.9", "2026.10.6", "5.17.0", "1.15.0")
    (folder / "UnslothGRPOTrainer.py").write_text("x = 1\n")
    assert machine._compiled_for(folder) is None
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path / "elsewhere"))
    assert machine._compiled_cache() is None


def test_the_driver_is_asked_for_its_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuDriverGetVersion(self, number: Any) -> int:
            number._obj.value = 12080
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert machine._driver_cuda() == (12, 8)

    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert machine._driver_cuda() is None


def test_a_shadowed_package_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shadowed_by_me").mkdir()
    (tmp_path / "shadowed_by_me" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    assert machine._origin("shadowed_by_me") == str(tmp_path / "shadowed_by_me" / "__init__.py")
    assert machine._origin("no_such_package_at_all") is None


def test_an_unfit_trl_is_a_finding_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine._trl_problem() is None
    monkeypatch.setattr("mel_lite.trl_compat.SUPPORTED", ("0.1", "0.2"))
    assert "trl==1.15.0 is installed" in str(machine._trl_problem())


def test_models_of_every_kind_can_be_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "base", "qwen3")
    assert machine._is_cached(str(folder)) and machine._is_cached("demo")
    assert not machine._is_cached("./no/such/folder") and not machine._is_cached("nobody/nothing")
    weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(tiny_config("qwen3")).parameters())
    assert machine._model_bytes(str(folder)) == 2 * weights
    assert machine._model_bytes("demo") == 2 * 134_515_008
    assert machine._model_bytes("nobody/nothing") is None and machine._model_bytes("./no/such/folder") is None
