"""The command that installs an extra of a package that is on no index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mel_lite import imports
from mel_lite.imports import install_command


def test_a_checkout_is_named_with_its_path() -> None:
    root = Path(__file__).resolve().parents[1]
    assert install_command("gym") == f'pip install -e "{root}[gym]"'
    assert "gym = [" in (root / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("recorded", "command"),
    [
        ({"url": "file:///w/m.whl", "archive_info": {}}, 'pip install "mel-lite[gpu] @ file:///w/m.whl"'),
        ({"url": "file:///w/mel-lite", "dir_info": {}}, 'pip install "mel-lite[gpu] @ file:///w/mel-lite"'),
        (
            {"url": "https://h/m.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            'pip install "mel-lite[gpu] @ git+https://h/m.git@abc"',
        ),
        (None, 'pip install -e ".[gpu]" in a clone of the repository'),
    ],
)
def test_an_installed_copy_is_named_by_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: dict[str, object] | None, command: str
) -> None:
    info = tmp_path / "mel_lite-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mel-lite\nVersion: 9\n")
    if recorded is not None:
        (info / "direct_url.json").write_text(json.dumps(recorded))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(imports, "__file__", str(tmp_path / "mel_lite" / "imports.py"))
    assert install_command("gpu") == command
