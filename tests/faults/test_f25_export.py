"""F25: an export killed at each of its file operations, and an export read by a process without MEL-Lite.

tests/export/test_merge.py tests fidelity, tied heads, 4-bit bases and existing folders. Nothing is merged into 4-bit
weights: `merged-16bit` is the only merged format, and a 4-bit base is merged as the adapter saw it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mel_lite.export.merge import export
from mel_lite.models.adapters import attach_adapter, write_fingerprint
from tiny_models import save_tiny, set_lora
from trainers import LORA, tiny_model

FORK = multiprocessing.get_context("fork")
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.link")
IDS = [[5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_tiny(folder / "base")
    model = get_peft_model(tiny_model(folder / "base"), LoraConfig(**LORA))
    set_lora(model, 0.2)
    model.save_pretrained(folder / "adapter")
    write_fingerprint(folder / "adapter", model)
    return folder / "adapter"


def exported(adapter_dir: Path, target: Path, form: str, kill_at: int | None) -> tuple[int, int]:
    """Export in a separate process. Return its exit code and the number of its file operations next to `target`."""
    count = FORK.Value("i", 0)

    def child() -> None:
        def hook(name: str, args: tuple[Any, ...]) -> None:
            writes = (
                name == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            )
            if (writes or name in CHANGES) and str(args[0]).startswith(str(target.parent)):
                count.value += 1
                if count.value == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        export(adapter_dir, target, format=form)
        os._exit(0)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    return int(process.exitcode or 0), count.value


def files(folder: Path) -> dict[str, bytes]:
    # The report holds the duration, which differs.
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "export_report.json"}


@pytest.mark.parametrize("form", [pytest.param("merged-16bit", marks=pytest.mark.slow), "adapter"])
def test_a_half_export_is_never_visible(adapter_dir: Path, tmp_path: Path, form: str) -> None:
    """Kill the export at a dozen of its operations, including the first and the last.

    Each time there is no folder of that name, or the complete one, and the next export deletes what was left.
    """
    whole = tmp_path / "whole" / "out"
    whole.parent.mkdir()
    code, operations = exported(adapter_dir, whole, form, None)
    assert code == 0 and operations >= 5
    expected, seen_partial = files(whole), 0
    assert len(expected) >= 3
    events = sorted({1 + round(i * (operations - 1) / 11) for i in range(12)})
    assert events[0] == 1 and events[-1] == operations
    for event in events:
        place = tmp_path / str(event)
        place.mkdir()
        code, _ = exported(adapter_dir, place / "out", form, event)
        assert code == -signal.SIGKILL, event
        left = [path.name for path in place.iterdir()]
        seen_partial += any(name.endswith(".partial") for name in left)
        if (place / "out").exists():
            assert files(place / "out") == expected, f"half an export after operation {event}"
            continue
        assert all(name.startswith(".") for name in left), left
        export(adapter_dir, place / "out", format=form)
        assert files(place / "out") == expected
        assert [path.name for path in place.iterdir()] == ["out"], "the partial folder is deleted"
    assert seen_partial >= 3


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits[0].tolist()))
assert not any(name.startswith(("mel_lite", "peft")) for name in sys.modules if name != "peft")
"""


@pytest.mark.slow
def test_a_fresh_process_reads_the_merged_model(adapter_dir: Path, tmp_path: Path) -> None:
    export(adapter_dir, tmp_path / "out", dtype="bfloat16")
    done = subprocess.run(
        [sys.executable, "-P", "-c", PLAIN, str(tmp_path / "out"), json.dumps(IDS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    merged = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    base = tiny_model(adapter_dir.parent / "base")
    with torch.no_grad():
        plain = base(torch.tensor(IDS)).logits[0]
        adapted = attach_adapter(base, adapter_dir)(torch.tensor(IDS)).logits[0]
    assert (adapted - plain).abs().max() > 0.1, "the adapter changes something"
    kl = torch.nn.functional.kl_div(merged.log_softmax(-1), adapted.log_softmax(-1), log_target=True, reduction="none")
    assert kl.sum(-1).mean() < 1e-3
    assert torch.equal(merged.argmax(-1), adapted.argmax(-1))
