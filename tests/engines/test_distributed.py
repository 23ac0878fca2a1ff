"""Two processes on a CPU (gloo): the same update as with one, a single writer, no rank left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.engines.distributed import SplitEngine
from mel_lite.lessons.store import ExperienceStore
from mel_lite.models.adapters import base_fingerprint
from mel_lite.models.load import ModelSpec, load_base
from mel_lite.resilience.checkpoint_files import committed, problem
from mel_lite.types import Finish
from rank_run import main as run_alone
from tiny_models import save_tiny

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
# Without GPUs, accelerate starts several processes only with --multi_gpu. They select gloo by themselves.
LAUNCH = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
EXACT: dict[str, Any] = {
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "max_steps": 6,
    "grad_norm_every": 1,
    "replay_control": True,
}


SPREAD = str(HELPERS / "spread_ranks.py")
FSDP2 = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", str(HELPERS.parents[1] / "configs" / "accelerate" / "fsdp2.yaml")),
    *("--mixed_precision", "no", "--main_process_port", "0"),
]


def launch(*arguments: str, check: bool = True, command: list[str] = LAUNCH) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=1200)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("group", "tokens"), [(4, None), (8, None), (4, 150)])
def test_two_processes_make_the_update_of_one(tmp_path: Path, group: int, tokens: int | None) -> None:
    """With G=8, each group is split over both ranks. With a token budget, ranks have different numbers of parts."""
    for name in ("one", "two"):
        save_tiny(tmp_path / name / "base")
    options = EXACT | {"num_generations": group, "save_strategy": "steps", "save_steps": 4}
    run_alone(tmp_path / "one", options | {"per_device_train_batch_size": 8})
    halved = options | {"per_device_train_batch_size": 4, "max_micro_batch_tokens": tokens}
    halved["skip_zero_advantage"] = tokens is not None
    launch(str(HELPERS / "rank_run.py"), str(tmp_path / "two"), json.dumps(halved))

    alone = load_file(tmp_path / "one" / "weights-0.safetensors")
    ranks = [load_file(tmp_path / "two" / f"weights-{rank}.safetensors") for rank in (0, 1)]
    for name, expected in alone.items():
        assert (ranks[0][name] == ranks[1][name]).all(), f"ranks drifted apart in {name}"
        assert (ranks[0][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name

    carried = [json.loads((tmp_path / "two" / f"carried-{rank}.json").read_text()) for rank in (0, 1)]
    whole = json.loads((tmp_path / "one" / "carried-0.json").read_text())
    assert [a + b for a, b in zip(*carried, strict=True)] == whole and sum(whole) > 0
    assert carried[0] != carried[1], "there is no step in which only one rank had a lesson"

    lines = {}
    for name in ("one", "two"):
        text = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        lines[name] = [json.loads(line) for line in text if '"reward"' in line]
    for key in ("reward", "mel/replay_valid", "mel/mixed_groups", "mel/trained_tokens", "mel/nll", "mel/grad_norm_nll"):
        one, two = ([line.get(key) or 0.0 for line in lines[name]] for name in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-3), key
    stored = []
    for name in ("one", "two"):
        with ExperienceStore(tmp_path / name / "run" / "experiences.sqlite", read_only=True) as store:
            stored.append([(row.id, row.step, row.status, row.analysis, row.pair_index) for row in store.list()])
    assert stored[0] == stored[1] and len(stored[0]) > 2
    assert [path.name for path in committed(tmp_path / "two" / "run")] == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.slow
def test_two_processes_overlap_like_one(tmp_path: Path) -> None:
    """Ranks sample different numbers of lessons in flight, in one call each per step, and store what one rank does."""
    for name in ("one", "two"):
        save_tiny(tmp_path / name / "base")
    options = EXACT | {
        "mel_schedule": "overlap", "replay_criterion": "solved_once", "replay_attempts": 2, "replay_control": False,
        "pairs_per_group": 3, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant",
    }  # fmt: skip
    run_alone(tmp_path / "one", options | {"per_device_train_batch_size": 8})
    halved = options | {"per_device_train_batch_size": 4}
    launch(str(HELPERS / "rank_run.py"), str(tmp_path / "two"), json.dumps(halved | {"max_steps": 3}))
    launch(str(HELPERS / "rank_run.py"), str(tmp_path / "two"), json.dumps(halved | {"resume": True}))

    alone = load_file(tmp_path / "one" / "weights-0.safetensors")
    ranks = [load_file(tmp_path / "two" / f"weights-{rank}.safetensors") for rank in (0, 1)]
    for name, expected in alone.items():
        assert (ranks[0][name] == ranks[1][name]).all(), f"ranks drifted apart in {name}"
        assert (ranks[0][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name
    calls = [json.loads((tmp_path / "two" / f"calls-{rank}.json").read_text()) for rank in (0, 1)]
    whole = json.loads((tmp_path / "one" / "calls-0.json").read_text())
    assert [a + b for a, b in zip(*calls, strict=True)] == whole[3:] and calls[0] != calls[1]
    stored = []
    for name in ("one", "two"):
        with ExperienceStore(tmp_path / name / "run" / "experiences.sqlite", read_only=True) as store:
            stored.append(
                [(row.id, row.step, row.staleness_steps, row.status, row.replay_texts) for row in store.list()]
            )
    assert stored[0] == stored[1] and {row[2] for row in stored[0]} == {2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["kl", "sampled"])
def test_two_processes_teach_what_one_teaches(tmp_path: Path, form: str) -> None:
    """With G=8 a rollout's sibling may be on the other rank."""
    for name in ("one", "two"):
        save_tiny(tmp_path / name / "base")
    options = EXACT | {
        "num_generations": 8, "max_steps": 3, "internalisation": "distill",
        "internalisation_options": {"context": "sibling", "form": form, "reader": "frozen", "mask": "shift"},
    }  # fmt: skip
    run_alone(tmp_path / "one", options | {"per_device_train_batch_size": 8})
    halved = options | {"per_device_train_batch_size": 4, "max_micro_batch_tokens": 150}
    launch(str(HELPERS / "rank_run.py"), str(tmp_path / "two"), json.dumps(halved))

    alone = load_file(tmp_path / "one" / "weights-0.safetensors")
    ranks = [load_file(tmp_path / "two" / f"weights-{rank}.safetensors") for rank in (0, 1)]
    for name, expected in alone.items():
        assert (ranks[0][name] == ranks[1][name]).all(), f"ranks drifted apart in {name}"
        assert (ranks[0][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name
    logged = {}
    for name in ("one", "two"):
        text = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        logged[name] = [json.loads(line)["mel/taught_rows"] for line in text if '"reward"' in line]
    assert logged["one"] == [2 * rows for rows in logged["two"]] and any(logged["one"]), "the mean over the ranks"


@pytest.mark.slow
@pytest.mark.parametrize("group", [2, 8])
def test_two_processes_draw_the_prompts_of_one(tmp_path: Path, group: int) -> None:
    """Dynamic sampling and the difficulty memory decide alike on all ranks, also when a group is split over both."""
    for name in ("one", "two"):
        save_tiny(tmp_path / name / "base")
    options = EXACT | {
        "algorithm": "grpo", "replay_control": False, "num_generations": group, "max_steps": 5,
        "dynamic_sampling_rounds": 3, "rest_after": 1, "rest_batches": 2,
    }  # fmt: skip
    run_alone(tmp_path / "one", options | {"per_device_train_batch_size": 8})
    launch(
        str(HELPERS / "rank_run.py"),
        str(tmp_path / "two"),
        json.dumps(options | {"per_device_train_batch_size": 4}),
    )
    alone = load_file(tmp_path / "one" / "weights-0.safetensors")
    ranks = [load_file(tmp_path / "two" / f"weights-{rank}.safetensors") for rank in (0, 1)]
    for name, expected in alone.items():
        assert (ranks[0][name] == ranks[1][name]).all(), f"ranks drifted apart in {name}"
        assert (ranks[0][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-8, name
    logged = []
    for name in ("one", "two"):
        text = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in text if '"reward"' in line]
        logged.append([{key: row[key] for key in row if key.startswith("sampling/")} for row in rows])
    assert logged[0] == logged[1]
    assert group == 8 or max(row["sampling/rounds"] for row in logged[0]) > 1


@pytest.mark.slow
def test_two_processes_keep_the_bank_of_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_tiny(tmp_path / name / "base")
    options = EXACT | {
        "internalisation": "distill", "internalisation_options": {"form": "sampled"}, "bank_settled": None,
        "bank_settled_nats": None, "grad_norm_every": 0, "max_steps": 4,
    }  # fmt: skip
    run_alone(tmp_path / "one", options | {"per_device_train_batch_size": 8})
    halved = options | {"per_device_train_batch_size": 4}
    launch(str(HELPERS / "rank_run.py"), str(tmp_path / "two"), json.dumps(halved))
    ranks = [json.loads((tmp_path / "two" / f"bank-{rank}.json").read_text()) for rank in (0, 1)]
    alone = json.loads((tmp_path / "one" / "bank-0.json").read_text())
    assert ranks[0] == ranks[1], "bit for bit"
    assert ranks[0]["counts"] == alone["counts"] and alone["counts"]["examined"] > 2
    ours, theirs = ([lesson.pop("score") for lesson in bank["lessons"]] for bank in (ranks[0], alone))
    assert ours == pytest.approx(theirs, abs=1e-3) and ranks[0]["lessons"] == alone["lessons"]
    assert any(score != round(score) for score in theirs), "a score moved"


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_a_dead_process_ends_the_run_and_leaves_the_checkpoint(tmp_path: Path, spread: bool) -> None:
    save_tiny(tmp_path / "base")
    options = EXACT | {"max_steps": 50, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    dying = options | {"dies_after": 2}
    if spread:
        run = {".": dying | {"grad_norm_every": 0}}
        done = launch(SPREAD, str(tmp_path), json.dumps(run), check=False, command=FSDP2)
    else:
        done = launch(str(HELPERS / "rank_run.py"), str(tmp_path), json.dumps(dying), check=False)
    assert done.returncode != 0 and "exitcode  : 9" in done.stderr and "rank      : 1" in done.stderr
    saved = committed(tmp_path / "run")
    assert [path.name for path in saved] == ["checkpoint-1", "checkpoint-2"]
    assert all(problem(path) is None for path in saved)
    run_alone(tmp_path, options | {"per_device_train_batch_size": 8, "max_steps": 3, "resume": True})
    assert [path.name for path in committed(tmp_path / "run")][-1] == "checkpoint-3"


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_the_command_trains_on_two_processes(tmp_path: Path, spread: bool) -> None:
    save_tiny(tmp_path / "base")
    tasks = [{"prompt": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(12)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    settings = {
        "model.name": tmp_path / "base", "model.dtype": "float32", "lora.start_from": "null",
        "data.train": tmp_path / "tasks.jsonl", "data.eval": tmp_path / "tasks.jsonl", "data.eval_split": "null",
        "eval.limit": 5, "eval.k": 2, "train.max_completion_length": 8, "train.analysis_max_tokens": 16,
        "train.max_context_tokens": 480, "train.max_steps": 2, "train.per_device_train_batch_size": 8,
        "train.gradient_accumulation_steps": 1, "train.save_steps": 1,
    }  # fmt: skip
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    folder = tmp_path / "run"
    command = [*FSDP2, SPREAD] if spread else [*LAUNCH, "-m", "mel_lite"]
    arguments = ["train", "--gpu", "cpu", *flags, "--output-dir", str(folder)]
    done = launch(*arguments, command=command)
    assert "2 processes" in done.stdout and done.stdout.count("summary") == 1
    assert {p.name for p in folder.iterdir()} >= {
        "adapter",
        "config.yaml",
        "metrics.jsonl",
        "experiences.sqlite",
        "eval",
    }
    assert json.loads((folder / "eval" / "after.json").read_text())["n"] == 5
    assert [path.name for path in committed(folder)] == ["checkpoint-1", "checkpoint-2"]
    record = json.loads((folder / "adapter" / "mel_lite.json").read_text())
    assert record["base_fingerprint"] == base_fingerprint(load_base(ModelSpec(str(tmp_path / "base"))))
    assert any(name.endswith("lora_B.weight") for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
    again = launch(*arguments, check=False, command=command)
    assert again.returncode != 0 and again.stderr.count("is not empty") == 1
    assert "[rank" not in again.stderr and "mel_lite/run/" not in again.stderr  # only the launcher's own traceback


def test_split_engine_splits_requests_and_restores_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request((i,), seed=i) for i in range(5)]

    class Echo(Engine):
        name = "echo"

        def wake(self) -> None: ...

        def sleep(self) -> None: ...

        def generate(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
            return [Completion(request.prompt_ids, (0.0,), Finish.STOP) for request in requests]

    shares: list[list[tuple[int, Completion]]] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.utils.gather_object", lambda share: shares.append(share) or share)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(KeyError):  # the other rank's share is missing
            SplitEngine(Echo()).generate(requests, Sampling(4))
    assert [[i for i, _ in share] for share in shares] == [[0, 2, 4], [1, 3]]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda share: shares[1] + shares[0])
    assert [c.ids for c in SplitEngine(Echo()).generate(requests, Sampling(4))] == [(i,) for i in range(5)]
