"""The notebooks hold no outputs, and run from top to bottom in a real Jupyter kernel, on the CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and len({cell["id"] for cell in cells}) == len(cells)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def _text(cells: list[dict[str, Any]]) -> str:
    """Everything the cells printed."""
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in cells
        for output in cell.get("outputs", [])
    )


@pytest.mark.slow
def test_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the notebook extra is not installed")
    client = pytest.importorskip("nbclient", reason="the notebook extra is not installed")
    (path,) = (path for path in NOTEBOOKS if path.stem == "01_quickstart")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(path, as_version=4)
    client.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute(env=os.environ | {"PYTHONSAFEPATH": "1"})
    said = _text(notebook.cells)
    assert "No GPU: two steps" in said and "Pass@1 (greedy)" in said and "faithful" in said
    assert "WRONG" in said and "WHAT THE MODEL WRITES" in said
    run = tmp_path / "runs" / "quickstart"
    assert (run / "merged-16bit" / "model.safetensors").is_file() and (run / "adapter" / "mel_lite.json").is_file()
    from mel_lite.lessons.store import ExperienceStore

    with ExperienceStore(run / "experiences.sqlite", read_only=True) as store:
        rows = store.list()
    assert rows and any(row.nll_after is not None for row in rows)
    assert all(row.nll_after < row.nll_before for row in rows if row.nll_after is not None)
