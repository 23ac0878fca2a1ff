"""The meta-experiences of a run as a dataset folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.errors import StoreError
from mel_lite.hub.dataset_card import MEANINGS, export_dataset
from mel_lite.lessons.store.rows import COLUMNS
from run_folders import make_run


def test_the_folder_loads_as_a_dataset_and_its_card_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lessons=6, hostile=True)
    done = CliRunner().invoke(app, ["experiences", "export", str(tmp_path / "lessons"), "--run", str(run)])
    assert done.exit_code == 0 and "wrote 6 rows" in done.stdout
    rows = load_dataset(str(tmp_path / "lessons"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == list(COLUMNS) and rows["step"] == [1, 2, 3, 4, 5, 6]
    assert [status == "kept" for status in rows["status"]] == [True, False, False, False, True, False]
    assert json.loads(rows[1]["prompt"]) == "What is 3 + 8 - 2?"
    card = DatasetCard.load(tmp_path / "lessons" / "README.md")
    assert card.data.task_categories == ["text-generation"] and card.data.size_categories == ["n<1K"]
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "data/train.parquet"}]
    assert "| `kept` | 2 | it was trained on |" in card.text and "| `leaked` | 1 |" in card.text
    assert "[HuggingFaceTB/SmolLM2-135M-Instruct]" in card.text and str(tmp_path) not in card.content
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "lessons").rglob("*") if path.is_file()}
    assert len(modes) == 1, "readable like any file"


def test_one_status_and_a_store_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lessons=6)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).unlink()
    assert export_dataset(run, tmp_path / "kept", status="kept") == 2
    text = (tmp_path / "kept" / "README.md").read_text()
    assert "| `kept` | 2 |" in text and "`leaked`" not in text and "`unknown`" in text


def test_a_folder_in_use_and_a_run_without_lessons_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", lessons=1)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="taken is not an empty folder"):
        export_dataset(run, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["notes.txt"]
    empty = make_run(tmp_path / "empty", lessons=0)
    with pytest.raises(StoreError, match="there is no such file"):
        export_dataset(empty, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        export_dataset(run, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "run", "taken"]


def test_every_column_is_explained() -> None:
    assert tuple(MEANINGS) == COLUMNS
