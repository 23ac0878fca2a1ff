"""Figures in the pages are those of the committed raw results, and of the planner."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as when it is run as a script
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/kernels.md", "docs/learning.md", "docs/memory.md"])
def test_pages_quote_the_raw_results(tables: ModuleType, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert page in tables.PAGES and tables.MARK.search(text)
    assert tables.filled(text) == text, "run python benchmarks/tables.py"


def test_a_changed_figure_is_noticed(tables: ModuleType) -> None:
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    changed = text.replace("MiB where full logits take", "MiB where  full logits take")
    assert changed != text and tables.filled(changed) == text
    with pytest.raises(KeyError):
        tables.filled("<!-- figures nothing -->\n<!-- /figures -->")
