"""Trackers and the Hub, checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from mel_lite import MELConfig, MELTrainer
from mel_lite.errors import ConfigError
from mel_lite.training.services import check_push, check_trackers
from trainers import sums


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"report_to": "neptune"}, "^report_to='neptune': the package is not installed. .* or set report_to=none"),
        ({"report_to": ["none", "wandbb"]}, "^report_to='wandbb' is not a tracker. Did you mean 'wandb'"),
        ({"push_to_hub": True}, "^push_to_hub=true in offline mode: nothing can be pushed"),
    ],
)
def test_the_trainer_checks_them_before_it_loads_its_model(tmp_path: Path, options: Any, words: str) -> None:
    args = MELConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, **options)
    with pytest.raises(ConfigError, match=words):
        MELTrainer("no-such-owner/no-such-model", args=args, train_dataset=sums())
