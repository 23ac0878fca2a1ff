"""After training: the model is released and exported, and a failed export says how to repeat it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mel_lite.recipe import resolve
from mel_lite.run import finish
from mel_lite.run import train as run
from train_command import command


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True])
def test_the_trained_model_is_given_up_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, four_bit: bool
) -> None:
    """Its tensors hold nothing any more; those of the test process itself are not counted."""
    before = {id(each) for each in gc.get_objects()}
    seen: list[tuple[int, int]] = []

    def held() -> int:
        tensors = [o for o in gc.get_objects() if id(o) not in before and isinstance(o, torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    release = finish.release

    def watched(trainer: Any) -> None:
        with_model = held()
        release(trainer)
        seen.append((with_model, held()))

    monkeypatch.setattr(run, "release", watched)
    monkeypatch.setattr(finish, "export", lambda *_, **__: None)
    command(tmp_path, model__load_in_4bit=str(four_bit).lower(), export__format="merged-16bit")
    ((with_model, without),) = seen
    assert with_model > 100_000 and without < 0.1 * with_model, seen
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("kill -9 $$", "not exported: the process was killed, probably because the host ran out of memory"),
        ("echo 'error: no room on the disk' >&2; exit 5", "not exported: no room on the disk"),
    ],
)
def test_a_failed_export_in_a_subprocess_says_why_and_how_to_try_again(
    program: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "python").chmod(0o700)
    monkeypatch.setattr(finish.sys, "executable", str(tmp_path / "python"))
    recipe, console = resolve(preset="24gb"), Console(record=True, width=200, file=(tmp_path / "shown").open("w"))
    assert finish.export_trained(recipe, tmp_path / "adapter", tmp_path, console, in_subprocess=True) is None
    first, second = console.export_text().strip().splitlines()
    assert first == message
    command = f"mel-lite export {tmp_path / 'adapter'} --output {tmp_path / 'merged-16bit'}"
    assert second.endswith(f"CUDA_VISIBLE_DEVICES= {command} --format merged-16bit --dtype auto")
