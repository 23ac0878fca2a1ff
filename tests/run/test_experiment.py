"""Experiments: arms by name, one run after another, stops and failures; and one for real on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mel_lite.errors import ConfigError
from mel_lite.recipe import parse_set, resolve
from mel_lite.report.arms import Arm
from mel_lite.report.compare import compare
from mel_lite.report.runs import generated_tokens, read_run
from mel_lite.run.experiment import (
    ARMS,
    CONTROLS,
    Experiment,
    arms_of,
    in_subprocess,
    parse_arms,
    run_experiment,
)
from mel_lite.run.train import check
from run_folders import make_run
from train_command import command, task_settings


def experiment(folder: Path, **changes: Any) -> Experiment:
    options = {"seeds": range(2), "budget_tokens": 500, "base": ("--gpu", "cpu")} | changes
    return Experiment(folder / "out", parse_arms(["grpo", "mel"], []), **options)


class Launcher:
    """Stands for the process of a run: writes what a finished run leaves, or ends with a code."""

    def __init__(self, **codes: int) -> None:
        self.codes = codes
        self.checked: list[str] = []
        self.runs: list[str] = []

    def __call__(self, arguments: Sequence[str], log: Path) -> int:
        folder = Path(arguments[arguments.index("--output-dir") + 1])
        if "--dry-run" in arguments:
            self.checked.append(folder.name)
            return 0
        self.runs.append(folder.name)
        log.write_text("loading\nerror: no room\n")
        if code := self.codes.get(folder.name, 0):
            return code
        make_run(folder, before=[1, 2], after=[2, 3], lessons=0, seed=int(folder.name[-1]))
        return 0


def test_arms_are_recipes_that_can_be_run(tmp_path: Path) -> None:
    for name in ARMS:
        other = "mel" if name == "grpo" else "grpo"
        arm = parse_arms([name, other], [], group_size=8)[0]
        recipe = resolve(preset="cpu", overrides=list(arm.changes.items()))
        assert check(recipe, tmp_path).algorithm == ARMS[name]["train.algorithm"], name
    (resampling, _) = parse_arms(["resampling", "mel"], [], group_size=6)
    assert resampling.changes == {"train.algorithm": "grpo", "train.num_generations": 12}
    with pytest.raises(ConfigError, match="--arms resampling: its groups are twice as large as the recipe's"):
        parse_arms(["resampling", "mel"], [])
    chosen = parse_arms(["grpo", "tenth"], ["tenth:train.algorithm=mel", "tenth:train.mel_weight=0.1"])
    assert chosen[1].changes == {"train.algorithm": "mel", "train.mel_weight": 0.1}


def shown(tmp_path: Path, **rights: list[int]) -> tuple[str, ...]:
    """Conclusions about arms of three seeds, with this many right samples of 4 per task."""
    arms = [
        Arm(name, tuple(
            read_run(make_run(tmp_path / f"{name}-{seed}", after=right * 10, lessons=0, seed=seed)) for seed in range(3)
        ))
        for name, right in rights.items()
    ]  # fmt: skip
    return compare(arms, controls=CONTROLS).conclusions


@pytest.mark.slow
def test_what_a_control_shows_is_said_in_words(tmp_path: Path) -> None:
    found = shown(tmp_path, grpo=[1, 2, 1], mel=[3, 2, 3], **{"mel-shuffled": [3, 2, 3], "prompt-only": [2, 1, 1]})
    assert len(found) == 5
    assert found[0].startswith("mel ends 33.3 points [+") and found[0].endswith(
        "It is ahead on 3 of 3 seeds. So the lessons of mel were worth more than the rollouts that they cost."
    )
    assert found[1].startswith("mel-shuffled ends 33.3 points") and "So" not in found[1], "a control is no treatment"
    assert found[2].startswith("prompt-only and grpo cannot be told apart") and "So" not in found[2]
    assert found[3].startswith("mel and mel-shuffled cannot be told apart: the difference in Avg@4 is +0.0 [")
    assert found[3].endswith("So nothing shows that it matters what the lessons of mel say.")
    assert found[4].endswith(
        "So training as in mel does more than the same kind of lessons in the prompt of an untrained model."
    )
    reversed_ = shown(tmp_path / "b", mel=[3, 2, 3], grpo=[1, 2, 1], rft=[1, 1, 1])
    assert reversed_[0].startswith("grpo ends 33.3 points") and reversed_[0].endswith(
        "So the lessons of mel were worth more than the rollouts that they cost."
    )
    assert len(reversed_) == 2 and "So" not in reversed_[1], "rft has no lessons, so grpo is no control of it"


@pytest.mark.parametrize(
    ("names", "own", "message"),
    [
        (["grpo", "mell"], [], "--arms 'mell' is no arm. Did you mean 'mel'?"),
        (["grpo"], [], "at least two different arms"),
        (["mel", "mel"], [], "at least two different arms"),
        (["mel", "mine"], ["mine=3"], "write NAME:section.key=value"),
        (["mel", "grpo"], ["mel:train.seed=3"], "'mel' is a built-in arm"),
        (["mel", "a/b"], ["a/b:train.seed=3"], "write NAME:section.key=value"),
        (["mel", "grpo"], ["own:train.seed=3"], "--arm own:train.seed=3: --arms does not name this arm."),
    ],
)
def test_arms_that_cannot_be_are_refused(names: list[str], own: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_arms(names, own)
    assert message in str(error.value)


def test_a_run_gets_its_arm_seed_and_budget() -> None:
    tried = experiment(Path("x"))
    arguments = tried.arguments(tried.arms[1], 1)
    assert arguments[:6] == ["train", "--auto-resume", "--output-dir", "x/out/mel-1", "--gpu", "cpu"]
    settings = dict(parse_set(text) for text in arguments[7::2])
    assert settings["train.max_generated_tokens"] == 500 and settings["train.seed"] == 1
    assert settings["train.algorithm"] == "mel" and settings["export.format"] is None


def test_all_arms_of_a_seed_come_first_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    launch, said = Launcher(), []
    run_experiment(experiment(tmp_path), launch=launch, say=said.append)
    assert launch.runs == ["grpo-0", "mel-0", "grpo-1", "mel-1"]
    assert said[:2] == [f"checking options and data of arm {name}" for name in ("grpo", "mel")]
    assert said[2].startswith("run 1/4: grpo-0, output in ") and said[2].endswith("logs/grpo-0.log")
    run_experiment(experiment(tmp_path, seeds=range(3)), launch=launch, say=said.append)
    assert launch.runs[4:] == ["grpo-2", "mel-2"], "more seeds join"
    arms, left_out = arms_of(experiment(tmp_path, seeds=range(3)))
    assert [(arm.name, arm.seeds) for arm in arms] == [("grpo", [0, 1, 2]), ("mel", [0, 1, 2])] and left_out == []


def test_a_stopped_experiment_continues_with_the_run_that_was_stopped(tmp_path: Path) -> None:
    launch = Launcher(**{"mel-0": 130})
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment(tmp_path), launch=launch, say=str)
    assert launch.runs == ["grpo-0", "mel-0"]
    again = Launcher()
    run_experiment(experiment(tmp_path), launch=again, say=str)
    assert again.runs == ["mel-0", "grpo-1", "mel-1"]


def test_a_run_that_diverged_is_left_out_and_named(tmp_path: Path) -> None:
    run_experiment(experiment(tmp_path), launch=Launcher(**{"mel-0": 5}), say=str)
    arms, left_out = arms_of(experiment(tmp_path))
    assert [arm.seeds for arm in arms] == [[0, 1], [1]]
    assert left_out == ["mel-0 did not end and is left out, which favors its arm."]
    assert left_out[0] in compare(arms, left_out=left_out).limits
    run_experiment(experiment(tmp_path / "b", seeds=range(1)), launch=Launcher(**{"mel-0": 5}), say=str)
    with pytest.raises(ConfigError, match="No run of arm mel ended"):
        arms_of(experiment(tmp_path / "b", seeds=range(1)))


def test_a_run_that_failed_is_named_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run mel-0 failed with exit code 2: error: no room See .*logs/mel-0.log"):
        run_experiment(experiment(tmp_path), launch=Launcher(**{"mel-0": 2}), say=str)


def test_another_experiment_in_the_folder_is_refused(tmp_path: Path) -> None:
    run_experiment(experiment(tmp_path), launch=Launcher(), say=str)
    with pytest.raises(ConfigError, match="budget_tokens=500, now it is 900"):
        run_experiment(experiment(tmp_path, budget_tokens=900), launch=Launcher(), say=str)
    with pytest.raises(ConfigError, match="holds an experiment with base="):
        run_experiment(experiment(tmp_path, base=("--gpu", "24gb")), launch=Launcher(), say=str)
    plan = json.loads((tmp_path / "out" / "experiment.json").read_text())
    plan["arms"]["mel"]["train.mel_weight"] = 0.5
    (tmp_path / "out" / "experiment.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="arm mel has other options"):
        run_experiment(experiment(tmp_path), launch=Launcher(), say=str)


def test_a_damaged_plan_or_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    launch = Launcher()
    plan = tmp_path / "out" / "experiment.json"
    plan.parent.mkdir()
    for text in ('{"budget_tokens": 500', "[1]", '{"budget_tokens": 500, "base": [], "arms": []}'):
        plan.write_text(text)
        with pytest.raises(ConfigError, match=r"experiment.json is damaged.*Choose another --output"):
            run_experiment(experiment(tmp_path), launch=launch, say=str)
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "out").write_text("")
    with pytest.raises(ConfigError, match=r"--output .*file/out: it cannot be written \(File exists\)"):
        run_experiment(experiment(tmp_path / "file"), launch=launch, say=str)
    assert launch.checked == launch.runs == []


def test_an_arm_with_refused_options_stops_the_experiment_before_its_first_run(tmp_path: Path) -> None:
    runs: list[Sequence[str]] = []

    def launch(arguments: Sequence[str], log: Path) -> int:
        if "--dry-run" not in arguments:
            runs.append(arguments)
            return 0
        log.write_text("loading\nerror: unknown key train.learning_rat. Did you mean 'learning_rate'?\n")
        return 2 if "train.learning_rat=3" in arguments else 0

    tried = Experiment(
        tmp_path / "out", parse_arms(["grpo", "own"], ["own:train.learning_rat=3"]), range(2), 500, ("--gpu", "cpu")
    )
    with pytest.raises(ConfigError, match=r"arm own cannot be trained: unknown key train.learning_rat. Did you mean"):
        run_experiment(tried, launch=launch, say=str)
    assert runs == []
    assert [path.name for path in (tmp_path / "out" / "logs").iterdir()] == ["check-own.log"]


def test_only_arms_with_missing_runs_are_checked(tmp_path: Path) -> None:
    launch = Launcher(**{"mel-1": 130})
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment(tmp_path), launch=launch, say=str)
    assert launch.checked == ["grpo-0", "mel-0"]
    again = Launcher()
    run_experiment(experiment(tmp_path), launch=again, say=str)
    assert again.checked == again.runs == ["mel-1"]


def test_a_run_without_an_evaluation_ends_the_experiment(tmp_path: Path) -> None:
    class Blind(Launcher):
        def __call__(self, arguments: Sequence[str], log: Path) -> int:
            code = super().__call__(arguments, log)
            (Path(arguments[arguments.index("--output-dir") + 1]) / "eval" / "after.json").unlink(missing_ok=True)
            return code

    launch = Blind()
    with pytest.raises(ConfigError, match="run grpo-0 ended without an evaluation"):
        run_experiment(experiment(tmp_path), launch=launch, say=str)
    assert launch.runs == ["grpo-0"]


def test_without_held_out_tasks_nothing_is_trained(tmp_path: Path) -> None:
    launch = Launcher()
    recipe = resolve(preset="cpu", overrides=[("data.eval", None)])
    with pytest.raises(ConfigError, match="needs held-out tasks"):
        run_experiment(experiment(tmp_path, recipe=recipe), launch=launch, say=str)
    assert launch.runs == [] and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupt_waits_for_the_run_to_save(tmp_path: Path) -> None:
    """Ctrl-C reaches the run and this process; the run may take its time."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\ntrap 'sleep 0.5; echo saved; exit 130' INT\necho started\nsleep 60 & wait\n")
    program.chmod(0o700)
    code = (
        "import sys\nfrom pathlib import Path\nfrom mel_lite.run import experiment\n"
        f"sys.executable = {str(program)!r}\nlog = Path({str(tmp_path / 'log')!r})\n"
        "sys.exit(experiment.in_subprocess([], log))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    for _ in range(1200):
        if (tmp_path / "log").is_file() and "started" in (tmp_path / "log").read_text():
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert (tmp_path / "log").read_text() == "started\nsaved\n"


@pytest.mark.slow
def test_the_arm_without_training_reads_its_lessons(tmp_path: Path) -> None:
    """Three runs of one step: `prompt-only` changes no weight, and its last evaluation has lessons in the prompts."""
    tasks = [{"prompt": f"What is {i} plus 9?", "answer": str(i + 9)} for i in range(2)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    arm = parse_arms(["grpo", "prompt-only"], [])[1]
    settings = {"data.eval": tmp_path / "held_out.jsonl", "eval.k": 2} | arm.changes
    out = command(tmp_path, **{key.replace(".", "__"): value for key, value in settings.items()}).stdout
    assert "0 of 2 evaluation tasks have lessons in their prompts" in out, "a random model writes none"
    run = read_run(tmp_path / "run")
    assert run.before is not None and run.after == run.before, "no weight has changed"
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert not any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)


def test_the_log_of_a_run_is_plain_text_also_from_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jupyter kernel sets FORCE_COLOR: each turn of a spinner would become a part of the file."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    assert in_subprocess(["--help"], tmp_path / "log") == 0
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "Usage" in text and "compare" in text and "\x1b" not in text


LEARNABLE = """
from mel_lite.types import Verdict

def even(completion, answer, **columns):
    return bool(completion) and ord(completion[0]) % 2 == 0
"""


@pytest.mark.slow
def test_arms_are_trained_by_real_processes_and_learn_at_equal_tokens(tmp_path: Path) -> None:
    """Two arms of two seeds on a task that a tiny model learns; the same command again trains nothing."""
    (tmp_path / "parity.py").write_text(LEARNABLE)
    settings = task_settings(tmp_path) | {
        "data.eval": tmp_path / "held_out.jsonl", "eval.k": 8, "eval.temperature": 1.0, "eval.every_steps": 20,
        "train.verifier": "parity:even", "train.learning_rate": 0.005, "train.max_completion_length": 4,
        "train.per_device_train_batch_size": 16, "train.max_steps": 5, "train.save_steps": 20,
    }  # fmt: skip
    tasks = [{"prompt": f"What is {i} plus 9?", "answer": str(i + 9)} for i in range(8)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command_line = [
        sys.executable, "-m", "mel_lite", "compare", "--arms", "grpo,mel", "--seeds", "2", "--first-seed", "4",
        "--budget-tokens", "3000", "--gpu", "cpu", *flags, "--output", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    paths = filter(None, (os.environ.get("PYTHONPATH"), str(tmp_path)))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def compared() -> tuple[Any, str]:
        done = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=3000, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    found, said = compared()
    assert "run 4/4: mel-5, output in" in said
    assert [(arm["name"], arm["seeds"]) for arm in found["arms"]] == [("grpo", [4, 5]), ("mel", [4, 5])]
    for arm in found["arms"]:
        for folder in arm["folders"]:
            run = read_run(Path(folder))
            spent = generated_tokens(run.rows)
            assert spent[-1] >= 3000 > spent[-2], "the step that spends the tokens is the last one"
            assert run.before is not None and run.after is not None
            assert run.after.avg_at_k.value > run.before.avg_at_k.value + 0.2, "something was learned"
            assert [row["step"] for row in run.eval_rows] == list(range(20, run.steps, 20))
    assert "So nothing shows" in found["conclusions"][0] or "So the lessons" in found["conclusions"][0]
    assert any("With 2 seeds per arm" in limit for limit in found["limits"])
    again, said = compared()
    assert again == found and said.count("is there already") == 4
