"""The learning study: its tasks, its arms on the start model, and tables that hold the numbers of its run files."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mel_lite.lessons.parsing import parse_analysis
from mel_lite.lessons.prompts import load_templates, replay_prompt
from mel_lite.models.chat import render
from mel_lite.models.load import ModelSpec, load_tokenizer
from mel_lite.recipe import resolve
from mel_lite.types import Finish, Group

STUDY = Path(__file__).resolve().parents[2] / "benchmarks" / "learning"


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    """Make the benchmarks importable as when one of them is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        yield


@pytest.mark.slow
def test_the_study_trains_arms_with_the_command_and_writes_their_figures(tmp_path: Path) -> None:
    study = STUDY / "study.py"
    arms = ("grpo,num_iterations=2,learning_rate=5e-4", "bank-frozen,num_iterations=2,learning_rate=5e-4")
    command = [
        sys.executable, str(study), str(tmp_path / "runs"), "--regime", "plenty", "--split", "tune", "--arms", *arms,
        "--first-seed", "100", "--seeds", "1", "--budget-tokens", "14000", "--tasks", "4", "--samples", "2",
        "--results", str(tmp_path / "results"),
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(STUDY), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr
    for label in arms:
        file = tmp_path / "results" / "plenty" / "tune" / f"{label}-100.json"
        found = json.loads(file.read_text())
        assert found["arm"] == label.split(",")[0] and found["settings"]["num_iterations"] == 2
        assert str(STUDY) not in file.read_text() and str(tmp_path) not in file.read_text()
        tokens, steps = ([point[name] for point in found["points"]] for name in ("tokens", "step"))
        assert tokens[0] == steps[0] == 0 and tokens[-1] >= 14_000 > found["steps"][-3]["tokens"]
        assert steps[-1] == len(found["steps"]) and steps[-1] % 2 == 0, "all updates on the last batch"
        (middle,) = found["points"][1:-1]
        assert middle["step"] == 18 and 0 <= middle["avg_at_k"] <= 1 and 0 < middle["tokens"] < tokens[-1]
        for point in (found["points"][0], found["points"][-1]):
            assert len(point["tune"]["samples_right"]) == 4 and max(point["tune"]["samples_right"]) <= 2
        assert len(found["points"][-1]["longer"]["greedy_right"]) == 4
        rewards = [step["reward"] for step in found["steps"] if "reward" in step]
        assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.1, "something was learned"
        assert (found["bank"] is not None) == bool(found["lessons"]) == label.startswith("bank")


def run_of(arm: str, seed: int, right: list[int], *, longer: int = 0) -> dict[str, Any]:
    """Return a run whose 40 tasks end with these counts of right samples in turn, out of 8."""
    right = right * 20
    start = {"tokens": 0, "step": 0, "took_s": 0.0, "test": {"greedy_right": [0] * 40, "samples_right": [0] * 40}}
    end = {"tokens": 1000, "step": 4, "took_s": 9.0, "test": {"greedy_right": [1, 0] * 20, "samples_right": right}}
    end["longer"] = {"greedy_right": [0] * 40, "samples_right": [longer] * 40}
    steps = [{"step": 1, "tokens": 1000, "reward": 0.5, "completions/mean_length": 12.5}]
    settings = {"num_iterations": 2, "learning_rate": 1e-4}
    return {"arm": arm, "seed": seed, "settings": settings, "bank": None, "points": [start, end], "steps": steps}


def test_tables_compare_arms_by_seed_and_name_the_rule_s_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = importlib.import_module("learning_figures")
    monkeypatch.setattr(figures, "RUNS", tmp_path)
    (tmp_path / "starved").mkdir()
    for seed in (0, 1, 2):
        for run in (
            run_of("grpo", seed, [4, 2]), run_of("bank", seed, [6, 4], longer=8), run_of("mel", seed, [3, 1]),
            run_of("sibling", seed, [5, 1]),
        ):  # fmt: skip
            (tmp_path / "starved" / f"{run['arm']}-{seed}.json").write_text(json.dumps(run))
    rows = {line.split(" | ")[0].strip("| "): line for line in figures.results("starved").splitlines()}
    assert rows["grpo"].startswith("| grpo | 3 | 2 | 20% | 9 | 37.5% |")
    assert "| 62.5% | +25.0 [" in rows["bank"] and "| 3 of 3 | wins |" in rows["bank"] and "+100.0 [" in rows["bank"]
    assert "| 25.0% | -12.5 [" in rows["mel"] and "| 0 of 3 | loses |" in rows["mel"]
    assert "| 37.5% | +0.0 [" in rows["sibling"] and "| 0 of 3 | tie |" in rows["sibling"]
    lines = figures.summary("first").splitlines()[2:]
    short = {line.split(" | ")[0].strip("| "): line.split(" | ")[2] for line in lines}
    assert short["(tuned GRPO itself: start, end)"] == "0%, 37.5% |"
    assert short["MEL as in the paper"].startswith("**-12.5 [") and short["MEL as in the paper"].endswith(
        "0 of 3 seeds** |"
    )
    of_bank = "bank of lessons, one per prompt, distilled"
    assert short[of_bank].startswith("**+25.0 [") and short[f"{of_bank}, minus a right solution"].startswith(
        "**+25.0 ["
    )
    assert short["a right solution in place of lessons, distilled"].startswith("+0.0 [")
    made = (
        ("starved/fifth", "bank-open", [4, 2]), ("starved/fifth", "grpo", [4, 2]), ("wide-plenty", "grpo", [4, 2]),
        ("wide-plenty", "bank-open", [6, 4]), ("wide-starved", "grpo", [4, 2]), ("wide-starved", "bank-open", [8, 6]),
    )  # fmt: skip
    for folder, arm, right in made:
        (tmp_path / folder).mkdir(exist_ok=True)
        for seed in (0, 1, 2):
            (tmp_path / folder / f"{arm}-{seed}.json").write_text(json.dumps(run_of(arm, seed, right)))
    top = figures.top()
    assert "number of tokens, +50.0 [" in top and "] points where reward is starved, ahead on 3 of 3 seeds, and" in top
    assert "+25.0 [" in top and "] points where reward is plentiful, ahead on 3 of 3 seeds." in top
    assert top.endswith("+0.0 [-8.8, +8.8], a tie by the rule.")
    assert "`bank` +25.0 [" in figures.results("starved").split("Minus `sibling`, in points: ")[1]
    halfway = run_of("grpo", 3, [4, 2])
    halfway["points"].insert(1, {"tokens": 500, "step": 2, "took_s": 4.0, "avg_at_k": 0.5})
    (tmp_path / "starved" / "grpo-3.json").write_text(json.dumps(halfway))
    assert [round(figures.mean_avg(halfway, point), 3) for point in range(3)] == [0.0, 0.5, 0.375]
    assert "| grpo | 4 | 2 | 20% | 9 | 37.5% |  |  |  | 40.6% |" in figures.results("starved")
    assert figures.per_seed("starved").splitlines()[2] == "| grpo | 37.5% | 37.5% | 37.5% | 37.5% |"


def test_no_result_names_a_path_of_the_machine_that_made_it() -> None:
    results = STUDY.parent / "results"
    files = sorted(results.rglob("*.json"))
    assert len(files) > 300
    named = [file.name for file in files if re.search(r'"/(?:home|root|work|tmp|mnt|opt|Users)/', file.read_text())]
    assert not named


def test_the_packaged_recipe_is_an_arm_of_the_study() -> None:
    arms = importlib.import_module("learning_arms").ARMS
    train = resolve(preset="cpu", config=Path("bank")).train
    assert {name: train[name] for name in arms["bank-forks"]} == arms["bank-forks"]


@pytest.mark.parametrize("name", ["learning_subject", "wide_subject"])
def test_held_out_questions_are_in_no_training_split(name: str) -> None:
    subject = importlib.import_module(name)
    for regime in subject.REGIMES:
        splits = {split: {text for text, _ in subject.questions(regime, split)} for split in subject.SPLITS}
        assert [len(splits[name]) for name in ("test", "longer", "tune", "train")] == [150, 100, 150, 3000]
        assert not splits["train"] & (splits["test"] | splits["tune"] | splits["longer"])
        assert not splits["tune"] & splits["test"]


def test_only_all_right_totals_pass() -> None:
    subject = importlib.import_module("learning_subject")
    truth = subject.truth()
    text = subject.solution((3, 5, 2), ("zap", "dax"), (truth["zap"], truth["dax"]))
    answer = subject.trail(text)
    assert subject.strict(text, answer) and len(answer.split()) == 3
    lucky = text.split("\n")
    lucky[0] = lucky[0][:-1] + str((int(lucky[0][-1]) + 1) % 10)
    assert not subject.strict("\n".join(lucky), answer) and not subject.strict(
        text.removesuffix("\n" + lucky[-1]), answer
    )
    assert subject.rules_in("- If I see zap, then zap is take.\n- If I see a, then b is c.") == [("zap", "take")]


def test_the_wide_subject_judges_whole_solutions_so_that_no_wrong_reading_passes() -> None:
    subject = importlib.import_module("wide_subject")
    truth = subject.truth()
    assert len(truth) == len(set(subject.OPERATORS)) == 64
    first, second = (next(each for each in truth if truth[each] == word) for word in ("add", "larger"))
    question = subject.Question((3, 0, 2), (first, second))
    assert question.lines(["add", "larger"]) == [f"3 {first} add 0 3", f"3 {second} larger 2 3", "Answer: 3"]
    lucky = "\n".join(question.lines(["take", "larger"]))
    assert lucky.endswith("Answer: 3"), "the same totals by another reading"
    right = subject.true_solution(question.text)
    assert subject.strict(right, question.answer) and not subject.strict(lucky, question.answer)
    assert not subject.strict(right.removesuffix("\nAnswer: 3"), question.answer)
    assert subject.rules_in(subject.true_rules(question.text)) == [(first, "add"), (second, "larger")]
    assert len(subject.rules_in(subject.true_rules(question.text, 1))) == 1
    for readings in subject.mix().values():
        assert sum(readings.values()) == pytest.approx(1) and all(share > 0 for share in readings.values())


def test_the_wide_start_model_was_trained_on_the_prompts_of_the_package() -> None:
    training, subject = (importlib.import_module(name) for name in ("wide_training", "wide_subject"))
    spec = ModelSpec(str(subject.MODEL), dtype="float32")
    tokenizer, templates = load_tokenizer(spec), load_templates(str(subject.MODEL / "templates.yaml"))
    rng = random.Random(0)
    for name, make in training.KINDS.items():
        example = make(rng, 4)
        roles = ("system", "user") if name == "analyse" else ("user",)
        turns = [{"role": role, "content": text} for role, text in zip(roles, example.turns, strict=True)]
        text = training.prompt_of(example)
        assert list(render(turns, tokenizer, prefill=example.prefill)) == tokenizer(text)["input_ids"], name
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    lesson = training.lesson("3 bam add 2 5", "bam", "add", "take")
    parsed = parse_analysis(lesson, finish=Finish.STOP)
    assert parsed.heuristic == "- If I see bam, I write bam take." and "`3 bam add 2 5`" in parsed.bifurcation
    group = Group([{"role": "user", "content": "3 bam 2?"}], "", ())
    note = training.TEMPLATES["replay_user"].format(experience=lesson, question="3 bam 2?")
    prompt = training.prompt_of(training.Example((note,), "", ""))
    assert list(replay_prompt(group, lesson, tokenizer, templates)) == tokenizer(prompt)["input_ids"]


@pytest.mark.slow
def test_training_the_wide_start_model_lowers_the_nll_of_every_kind() -> None:
    training = importlib.import_module("wide_training")
    torch.manual_seed(0)
    tokenizer = training.make_tokenizer()
    model = training.make_model(tokenizer)
    saved: list[int] = []
    log = training.train(model, tokenizer, 100, 200, lambda: saved.append(1))
    assert [row["step"] for row in log] == [100, 200] and len(saved) == 2
    assert set(log[0]) == {"step", "repeat", "lookups"} and set(log[1]) == {"step", *training.KINDS}
    assert log[1]["analyse"] < 3.0 and log[1]["rules"] < 3.0, "a uniform guess is 6.1 nats"
