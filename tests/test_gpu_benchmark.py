"""`benchmarks/gpu.py` goes through all it would do on a GPU, with tiny sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


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
def test_the_dry_run_measures_every_phase_and_survives_what_hangs(tmp_path: Path) -> None:
    """The engines' own script is tested elsewhere; here it hangs, after a first result."""
    scripts = tmp_path / "benchmarks"
    scripts.mkdir()
    for name in ("gpu.py", "random_models.py"):
        shutil.copy(SCRIPT.with_name(name), scripts)
    (scripts / "gpu_engines.py").write_text(ENGINES)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    options = ["--dry-run", "--parts", "step-24gb", "step-12gb", "engines", "--minutes", "2.2"]
    done = subprocess.run(
        [sys.executable, str(scripts / "gpu.py"), str(tmp_path / "out"), *options],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert list(found["parts"]) == ["step-24gb", "step-12gb", "engines"] and found["dry_run"]
    assert found["machine"]["packages"]["torch"]
    for part in ("step-24gb", "step-12gb"):
        figures = found["parts"][part]
        assert "error" not in figures, figures
        rows = {row["name"]: row for row in figures["phases"]}
        assert list(rows) == [
            "load", "update", "scoring", "update-plain", "optimiser", "rollout", "analysis", "replay"
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
    assert not status.exists() or "State:\tZ" in status.read_text(), "what it had started runs on"


@pytest.mark.slow
def test_a_part_that_dies_is_written_down(tmp_path: Path) -> None:
    """Here on an installation of bitsandbytes that is broken; the command itself ends well, with the reason."""
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
