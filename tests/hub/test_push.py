"""Uploads: the listing is exactly what goes, and what hinders one is a line."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.errors import ConfigError
from mel_lite.hub.dataset_card import export_dataset
from mel_lite.hub.model_card import write_run_cards
from mel_lite.hub.push import human, prepare, push
from run_folders import make_run


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that one upload of small files uses. It keeps what it was sent."""

    files: ClassVar[dict[str, bytes]] = {}
    made: ClassVar[list[dict[str, Any]]] = []
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            answer = {"url": f"{self.server.url}/owner/name"}  # type: ignore[attr-defined]
        elif "/preupload/" in self.path:
            wanted = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{self.server.url}/owner/name/commit/0", "commitOid": "0"}  # type: ignore[attr-defined]
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", server.url, raising=False)  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    Hub.files.clear()
    Hub.made.clear()
    Hub.status = 200
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "run", lessons=3)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 3000)
    (run / "adapter" / ".cache").mkdir()
    (run / "adapter" / ".cache" / "secret").write_text("not for others")
    (run / "adapter" / "a.lock").write_text("")
    write_run_cards(run)
    return run


def test_what_is_listed_is_what_goes(run_dir: Path, hub: type[Hub]) -> None:
    upload = prepare(run_dir, "owner/name", private=True)
    assert upload.folder == run_dir / "adapter" and upload.repo_type == "model"
    assert [name for name, _ in upload.files] == ["README.md", "adapter_model.safetensors"]
    assert "2.9 KiB  adapter_model.safetensors" in upload.listing() and "(private)" in upload.listing()
    push(upload)
    assert {name: len(data) for name, data in hub.files.items()} == dict(upload.files)
    assert hub.files["README.md"] == (run_dir / "adapter" / "README.md").read_bytes()
    assert [(made["name"], made["visibility"]) for made in hub.made] == [("name", "private")]


def test_lessons_go_as_a_dataset(run_dir: Path, tmp_path: Path, hub: type[Hub]) -> None:
    export_dataset(run_dir, tmp_path / "lessons")
    upload = prepare(tmp_path / "lessons", "owner/name", private=False)
    assert upload.repo_type == "dataset" and "(public)" in upload.listing()
    push(upload)
    assert set(hub.files) == {"README.md", "data/train.parquet"} and hub.made[0]["type"] == "dataset"


def test_a_dry_run_and_offline_mode_show_the_list(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["push", str(run_dir), "owner/name", "--dry-run"])
    assert done.exit_code == 0 and "adapter_model.safetensors" in done.stdout and "nothing was uploaded" in done.stdout
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = CliRunner().invoke(app, ["push", str(run_dir), "owner/name"])
    assert "adapter_model.safetensors" in offline.stdout and isinstance(offline.exception, ConfigError)
    assert "push in offline mode. Nothing was uploaded." in str(offline.exception)


def test_a_hub_that_refuses_or_is_not_there_is_one_line(
    run_dir: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = prepare(run_dir, "owner/name", private=True)
    hub.status = 403
    with pytest.raises(ConfigError, match="Run `hf auth login` with a token that may write there"):
        push(upload)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    with pytest.raises(ConfigError, match="the Hub cannot be reached .* Nothing was uploaded"):
        push(upload)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="push without a token"):
        push(upload)


def test_what_cannot_be_uploaded_is_refused(run_dir: Path, tmp_path: Path) -> None:
    for folder, repo, message in (
        (tmp_path / "none", "owner/name", "there is no such folder"),
        (run_dir / "eval", "owner/name", "holds no weights and no dataset"),
        (run_dir, "a/b/c", "repository 'a/b/c': .* Write owner/name"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(folder, repo, private=True)
    (run_dir / "adapter" / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ConfigError, match="the Hub could not read this card"):
        prepare(run_dir, "owner/name", private=True)
    (run_dir / "adapter" / "README.md").unlink()
    with pytest.raises(ConfigError, match="the Hub could not read this card"):
        prepare(run_dir, "owner/name", private=True)


def test_sizes_have_the_unit_that_fits() -> None:
    assert [human(size) for size in (0, 1023, 1024, 5 * 1024**2, 3 * 1024**3)] == [
        "0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3.0 GiB",
    ]  # fmt: skip
