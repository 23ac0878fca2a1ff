"""What a run needs from outside, checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from command_line import mel_lite_command
from mel_lite.errors import ConfigError, ModelError
from mel_lite.models.load import ModelSpec, check_weights
from mel_lite.run.services import check_push, check_trackers
from task_files import write
from tiny_models import save_tiny


def test_trackers_must_be_installed() -> None:
    check_trackers("none")
    check_trackers([])
    with pytest.raises(ConfigError, match="'neptune': the package is not installed"):
        check_trackers(["neptune"])
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        check_trackers("wandbb")


@pytest.mark.parametrize(
    ("offline", "token", "words"),
    [(True, "hf_x", "offline mode"), (False, None, "without a token"), (False, "hf_x", "cannot be reached")],
)
def test_a_push_needs_network_and_token(
    monkeypatch: pytest.MonkeyPatch, offline: bool, token: str | None, words: str
) -> None:
    def unreachable(self: Any, token: str | None = None) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", unreachable)
    with pytest.raises(ConfigError, match=words):
        check_push(SimpleNamespace(hub_token=token))


def test_a_base_without_weights_is_found_out_early(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    check_weights(ModelSpec(str(base)))
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights here"):
        check_weights(ModelSpec(str(base)))


def test_one_command_starts_and_resumes(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    tasks = write(tmp_path / "t.jsonl", [{"prompt": f"{i}+2?", "answer": str(i + 2)} for i in range(8)])
    command = (
        "train", "--gpu", "cpu", "--model", base, "--dataset", tasks, "--algorithm", "grpo", "--output-dir",
        tmp_path / "run", "--auto-resume", "--set", "train.max_completion_length=8", "--set", "export.format=null",
        "--set", "train.save_strategy=steps", "--set", "train.save_steps=1", "--set", f"data.eval={tasks}",
    )  # fmt: skip
    first = mel_lite_command(*command, "--max-steps", 1)
    assert first.returncode == 0, first.stderr
    assert "1/1" in first.stdout
    second = mel_lite_command(*command, "--max-steps", 2)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    again = mel_lite_command(*command, "--max-steps", 2)
    assert again.returncode == 0, again.stderr
    assert "before" in again.stdout
    assert "2/2" not in again.stdout
    bare = mel_lite_command("train", "--gpu", "cpu", "--auto-resume")
    assert bare.returncode == 2
    assert "--output-dir" in bare.stderr
