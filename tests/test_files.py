"""Files and folders that are whole or not there: what a failure, a kill or a second writer leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mel_lite.files import atomic_write_text, nearest_existing_folder, publish_dir, replacing, sha256_of


def test_a_written_text_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("old", "new \N{GREEK SMALL LETTER LAMDA}"):
        atomic_write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as staged:
        staged.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_between_write_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old")
    code = """
import os, signal, sys
from pathlib import Path
from mel_lite.files import atomic_write_text
sys.addaudithook(lambda event, _: event == "os.rename" and os.kill(os.getpid(), signal.SIGKILL))
atomic_write_text(Path(sys.argv[1]), "new")
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_everything_is_on_the_disk_before_a_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = tmp_path / "staging"
    (staging / "inner").mkdir(parents=True)
    (staging / "inner" / "weights").write_bytes(b"w")
    (staging / "card").write_bytes(b"c")
    paths = {p.stat().st_ino: p.name for p in [tmp_path, staging, *staging.rglob("*")]}
    events: list[str] = []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(paths[os.fstat(descriptor).st_ino]))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    publish_dir(staging, tmp_path / "model")
    assert sorted(events[:4]) == ["card", "inner", "staging", "weights"]
    assert events[4:] == ["rename", tmp_path.name]
    assert (tmp_path / "model" / "inner" / "weights").read_bytes() == b"w" and not staging.exists()


def test_publishing_does_not_replace_a_folder_with_content(tmp_path: Path) -> None:
    for name in ("staging", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        publish_dir(tmp_path / "staging", tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "target"


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_nearest_existing_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "runs").mkdir()
    for path, found in {"runs": "runs", "runs/a/b": "runs", "none/a": "", "file": "", "file/a": ""}.items():
        assert nearest_existing_folder(Path(path)) == tmp_path / found
