"""F1, F2: SIGKILL at every file operation of a save, and at random times of a run.

Each kill hits a real process. After each, no committed checkpoint is damaged or lost, and the resumed run ends in the
same state as the uninterrupted run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fault_runs import Farm
from mel_lite.resilience import checkpoint_files
from trainers import step_log

Reference = tuple[dict[str, str], list[dict[str, Any]]]


def damaged(run: Path) -> list[str]:
    """Return the problems of the committed checkpoints of a run."""
    return [
        f"{path}: {trouble}" for path in checkpoint_files.committed(run) if (trouble := checkpoint_files.problem(path))
    ]


def newest(run: Path) -> int:
    """Return the step of the newest committed checkpoint, or 0 when there is none."""
    saved = checkpoint_files.committed(run)
    return int(saved[-1].name.split("-")[1]) if saved else 0


def clear(run: Path) -> None:
    """Restart like `mel-lite train --resume` without a committed checkpoint."""
    for leftover in run.glob("*"):
        if leftover.is_file():
            leftover.unlink()


def finishes_as(reference: Reference, runs: Farm, folder: Path, common: dict[str, Any]) -> None:
    """Resume the run to its end, and compare its whole state."""
    state, log = reference
    resume = bool(checkpoint_files.committed(folder / "run"))
    if not resume:
        clear(folder / "run")
    assert runs.run(folder, **common, resume=resume) == 0, (folder / "output.txt").read_text()
    assert json.loads((folder / "state.json").read_text()) == state
    assert step_log(folder / "run") == log, "each step is in metrics.jsonl once, as in the reference"
    left = [path.name for path in (folder / "run").iterdir() if path.name.startswith(checkpoint_files.STAGING)]
    assert left == [], "leftovers of the interrupted save are deleted"


def save_events(runs: Farm, folder: Path, common: dict[str, Any]) -> list[str]:
    """Return the file operations of the save after step 3, which also deletes the oldest of two kept checkpoints."""
    assert runs.run(folder, **common, kill_in_save=3) == 0, (folder / "output.txt").read_text()
    events: list[str] = json.loads((folder / "events.json").read_text())
    assert sum("os.rename" in event for event in events) >= 2, "the commit and the rotation"
    return events


def kill_in_save(runs: Farm, folder: Path, reference: Reference, common: dict[str, Any], event: int) -> None:
    assert runs.run(folder, **common, kill_in_save=3, kill_at_event=event) == -signal.SIGKILL
    assert damaged(folder / "run") == []
    assert newest(folder / "run") in (2, 3), "at least one committed checkpoint is always there"
    finishes_as(reference, runs, folder, common)


def test_killed_around_the_commit(runs: Farm, reference: Reference, folder: Path, common: dict[str, Any]) -> None:
    """Kills at the rename that commits and the one that rotates. The slow test covers all file operations."""
    events = save_events(runs, folder / "counted", common)
    renames = [i + 1 for i, event in enumerate(events) if event.startswith("os.rename")]
    for event in (renames[-2], renames[-1]):
        kill_in_save(runs, folder / str(event), reference, common, event)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_killed_at_every_file_operation_of_a_save(
    runs: Farm, reference: Reference, folder: Path, common: dict[str, Any], record_property: Any
) -> None:
    events = save_events(runs, folder / "counted", common)
    for event in range(1, len(events) + 1):
        kill_in_save(runs, folder / str(event), reference, common, event)
    record_property("kills_in_save", len(events))


def kill_at_random(
    runs: Farm, reference: Reference, folder: Path, common: dict[str, Any], kills: int, seed: int
) -> Counter[str]:
    """Kill and resume runs at random times, `kills` times in total. Returns: counts.

    Times are spread over the remaining work of a run, so that resumed runs are hit as often as new ones.
    """
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    undisturbed = runs.start(folder / "undisturbed", **common)
    undisturbed.wait_for("ready", 0, timeout_s=60)
    start_s = time.monotonic()
    assert undisturbed.wait() == 0, undisturbed.output()
    whole_s = time.monotonic() - start_s
    while seen["kills"] < kills:
        target, committed = folder / f"run{seen['runs']}", 0
        seen["runs"] += 1
        for _ in range(6):
            resume = committed > 0
            run = runs.start(target, **common, resume=resume)
            run.wait_for("ready", 0, timeout_s=60)
            time.sleep(rng.uniform(0.0, whole_s * (1 - committed / common["max_steps"])))
            with suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGKILL)
            status = run.wait()
            seen["kills"] += status != 0  # else it finished before the kill
            seen["resumes"] += resume and status != 0
            seen["checkpoints"] += len(checkpoint_files.committed(target / "run"))
            seen["corrupt_checkpoints"] += len(damaged(target / "run"))
            seen["lost_steps"] += max(0, committed - newest(target / "run"))
            committed = newest(target / "run")
            if status == 0 or seen["kills"] == kills or committed == common["max_steps"]:
                break
            if committed == 0:
                clear(target / "run")
        if committed < common["max_steps"]:
            finishes_as(reference, runs, target, common)
            seen["equal_ends"] += 1
    assert seen["corrupt_checkpoints"] == seen["lost_steps"] == 0, seen
    return seen


def test_killed_at_random_times(runs: Farm, reference: Reference, folder: Path, common: dict[str, Any]) -> None:
    assert kill_at_random(runs, reference, folder, common, kills=4, seed=1)["kills"] == 4


@pytest.mark.exhaustive
@pytest.mark.slow
def test_killed_a_hundred_times(
    runs: Farm, reference: Reference, folder: Path, common: dict[str, Any], record_property: Any
) -> None:
    seen = kill_at_random(runs, reference, folder, common, kills=100, seed=2)
    for name in ("kills", "resumes", "checkpoints", "corrupt_checkpoints", "lost_steps", "equal_ends"):
        record_property(name, seen[name])


def test_killed_in_the_middle_of_an_overlapped_batch(runs: Farm, folder: Path) -> None:
    """SIGKILL while one call samples rollouts, analyses and replays, and while what it sampled is judged."""
    common: dict[str, Any] = {
        "max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "mel_schedule": "overlap",
        "pairs_per_group": 2,
    }  # fmt: skip
    whole = folder / "whole"
    assert runs.run(whole, **common) == 0, (whole / "output.txt").read_text()
    reference = json.loads((whole / "state.json").read_text()), step_log(whole / "run")
    assert reference[1][2]["mel/in_flight"] > 0 and json.loads(reference[0]["tokens"]) > 1000
    for phase in ("rollout", "verify"):
        killed = folder / phase
        run = runs.start(killed, **common, slow_s=0.4)
        run.wait_for(phase, 3)
        run.send(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert damaged(killed / "run") == [] and newest(killed / "run") == 3
        finishes_as(reference, runs, killed, common)
