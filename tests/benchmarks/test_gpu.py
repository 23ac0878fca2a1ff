"""`benchmarks/gpu.py` with tiny sizes: everything that it does on a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from fake_vllm import trainer_with_fake_vllm
from mel_lite.memory.vllm import VLLMCard
from mel_lite.recipe import resolve
from trainers import build, even_ids

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


ENGINES = """
import json, subprocess, sys, time
def measure(out_dir, quick):
    found = {"checks": {"transformers on smollm2": {"load": {"ok": True}}}}
    (out_dir / "gpu-engines.json").write_text(json.dumps(found))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out_dir / "child").write_text(str(child.pid))
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_dry_run_measures_every_phase_and_survives_a_part_that_hangs(tmp_path: Path) -> None:
    """The script of the engines is replaced by one that hangs after its first result."""
    scripts = tmp_path / "benchmarks"
    scripts.mkdir()
    for name in ("gpu.py", "gpu_step.py", "random_models.py"):
        shutil.copy(SCRIPT.with_name(name), scripts)
    (scripts / "gpu_engines.py").write_text(ENGINES)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    options = ["--dry-run", "--parts", "kernel", "engines", "step-24gb", "step-12gb", "--minutes", "2.2"]
    done = subprocess.run(
        [sys.executable, str(scripts / "gpu.py"), str(tmp_path / "out"), *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(found["parts"]) == ["kernel", "engines", "step-24gb", "step-12gb"] and found["dry_run"]
    for shape in found["parts"]["kernel"]["shapes"]:
        errors = {each["name"]: each["logp_error"] for each in shape["results"]}
        assert errors["mel_lite"] < 1e-5, errors
    assert found["machine"]["packages"]["torch"]
    for part in ("step-24gb", "step-12gb"):
        figures = found["parts"][part]
        assert "error" not in figures, figures
        rows = {row["name"]: row for row in figures["phases"]}
        assert list(rows) == [
            "load", "update", "scoring", "update-plain", "optimizer", "rollout", "analysis", "replay"
        ]  # fmt: skip
        assert not any(row.get("lowered") for row in rows.values())
        for row in rows.values():
            assert "error" not in row and row["measured_bytes"] > 0 and row["seconds_s"] > 0, row
            assert sum(row["predicted_parts"].values()) == row["predicted_bytes"] > 0
        assert sum(row.get("share", 0) for row in rows.values()) == pytest.approx(1)
        assert rows["rollout"]["new_tokens"] == rows["rollout"]["full_tokens"] == 24
        assert rows["update"]["tokens"] >= 400
        assert part in done.stdout
    hung = found["parts"]["engines"]
    assert hung["checks"]["transformers on smollm2"]["load"]["ok"] and "exit code 124" in hung["error"]
    assert "transformers on smollm2: load ok" in done.stdout
    status = Path("/proc") / (tmp_path / "out" / "child").read_text() / "status"
    assert not status.exists() or "State:\tZ" in status.read_text(), "its child process is still running"


@pytest.mark.slow
def test_the_error_of_a_part_that_dies_is_recorded(tmp_path: Path) -> None:
    """With a broken installation of bitsandbytes, the command exits with 0 and reports the reason."""
    broken = tmp_path / "shadow" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.13: not found')\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "shadow"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--dry-run", "--parts", "step-16gb", "--minutes", "4"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "gpu.json").read_text())["parts"]["step-16gb"]
    assert "libcudart" in figures["error"] and "libcudart" in done.stdout
    assert figures["wall_s"] > 0 and "Traceback" in (tmp_path / "out" / "step-16gb.log").read_text()


def test_a_step_with_vllm_is_measured_with_all_sequences_and_its_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake vLLM that samples from a tiny model replaces Unsloth, vLLM and the GPU."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu_step import Measurement

    sizes = {"max_completion_length": 16, "analysis_max_tokens": 32, "max_context_tokens": 300, "grad_norm_every": 1}
    trainer, llm = trainer_with_fake_vllm(build, tmp_path, reward_funcs=even_ids, **sizes)
    options = {**sizes, "per_device_train_batch_size": 8, "num_generations": 4, "use_cpu": True}
    overrides = [("model.name", str(tmp_path / "base")), ("model.dtype", "float32"), ("data.max_prompt_tokens", 40)]
    overrides += [(f"train.{key}", value) for key, value in options.items()]
    recipe = resolve(overrides=[*overrides, ("model.gpu_memory_utilization", 0.25)])
    figures: dict[str, Any] = {"phases": []}
    part = Measurement(
        recipe, figures, tmp_path / "vllm-24gb.json", time.monotonic() + 600, vllm_on=VLLMCard(2**33, 2**33)
    )
    part.trainer = trainer

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            part.phases()
            trainer.args.max_steps = state.max_steps = 0

    trainer.add_callback(Begin())
    trainer.train()
    rows = {row["name"]: row for row in json.loads((tmp_path / "vllm-24gb.json").read_text())["phases"]}
    assert list(rows) == ["update", "scoring", "update-plain", "optimizer", "rollout", "analysis", "replay"]
    assert not any("error" in row or row["lowered"] for row in rows.values()), rows
    assert [rows[name]["sequences"] for name in ("rollout", "analysis", "replay")] == [8, 2, 2]
    assert rows["rollout"]["new_tokens"] == 16 and rows["analysis"]["new_tokens"] == 32
    assert {rows[name]["predicted_parts"]["vLLM's cache"] for name in ("rollout", "replay")} != {0}
    assert "vLLM asleep" in rows["update"]["predicted_parts"]
    assert sum(row.get("share", 0) for row in figures["phases"]) == pytest.approx(1)
    assert [len(call.prompts) for call in llm.calls[:6]] == [8, 8, 2, 2, 2, 2], "a probe, then all sequences"
