"""`mel-lite train` on a tiny model: tasks, the worst step, evaluations and the saved adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.errors import ConfigError, EngineError, ModelError
from mel_lite.models.load import ModelSpec, load_tokenizer
from mel_lite.recipe import resolve
from mel_lite.report.runs import evaluations as evaluations_of
from mel_lite.report.runs import read_run, series
from mel_lite.resilience import worst_step as worst_step_module
from mel_lite.run import evaluations, finish
from mel_lite.run import train as run
from tiny_adapters import make_adapter
from tiny_models import CHAT_TEMPLATE, save_tiny
from train_command import command


@pytest.mark.slow
def test_the_worst_step_comes_first_where_asked(tmp_path: Path) -> None:
    shown = command(tmp_path, "--worst-case").stdout.split("worst step: peak memory")[1]
    for phase in ("rollout", "analysis", "replay", "scoring", "update"):
        line = next(line for line in shown.splitlines() if phase in line)
        assert float(line.split()[1]) > 0.1, line  # GiB: the whole process, libraries included
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"reward"') == 1


def evaluated(folder: Path, *flags: str, **settings: Any) -> Any:
    """One step on the four training tasks, with two held-out tasks."""
    tasks = [{"prompt": f"What is {i} plus 9?", "answer": str(i + 9)} for i in range(2)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return command(folder, *flags, data__eval=folder / "held_out.jsonl", eval__k=2, eval__limit=2, **settings)


@pytest.mark.slow
def test_the_evaluation_waits_for_the_worst_step_and_its_tokens_are_not_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    measured = ((worst_step_module, "worst_step"), (evaluations, "evaluate"), (run.MELTrainer, "training_step"))
    for module, name in measured:
        original = getattr(module, name)

        def watched(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            order.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
    evaluated(tmp_path, "--worst-case", train__algorithm="grpo")
    assert order == ["worst_step", "evaluate", "training_step", "evaluate"]
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open() if '"reward"' in line]
    assert row["mel/generated_tokens"] == 8 * row["completions/mean_length"] > 0, "of the rollouts alone"


@pytest.mark.slow
def test_a_resumed_run_does_not_measure_another_model_as_the_one_it_began_with(tmp_path: Path) -> None:
    options = {"train__save_steps": 1, "train__save_strategy": "steps"}
    assert "Pass@1 (greedy)" in evaluated(tmp_path, **options).stdout
    before = tmp_path / "run" / "eval" / "before.json"
    began = before.read_text()
    assert "Pass@1 (greedy)" in evaluated(tmp_path, "--resume", train__max_steps=2, **options).stdout
    assert before.read_text() == began, "read, not measured again"
    before.unlink()
    assert "Pass@1 (greedy)" not in evaluated(tmp_path, "--resume", train__max_steps=3, **options).stdout
    assert not before.is_file()


@pytest.mark.slow
def test_evaluations_during_training_are_logged_and_change_nothing(tmp_path: Path) -> None:
    found = {}
    for name, every in (("with", "2"), ("without", "null")):
        (tmp_path / name).mkdir()
        options = {"train__max_steps": 5, "train__learning_rate": "1e-2", "train__logging_steps": 2}
        options |= {"train__algorithm": "grpo"}
        shown = evaluated(tmp_path / name, eval__every_steps=every, **options).stdout
        assert ("evaluation after step 2: Pass@1 " in shown) == (name == "with")
        if name == "with":
            assert shown.index("step 2/5 | ") < shown.index("evaluation after step 2") < shown.index("step 4/5 | ")
            assert shown.index("step 4/5 | ") < shown.index("evaluation after step 4")
        run = read_run(tmp_path / name / "run")
        weights = load_file(run.folder / "adapter" / "adapter_model.safetensors")
        timed = ("time/", "_s", "mel/tokens_per_s", "mel/peak_memory_gib", "step_time", "train_")
        rows = [
            {key: value for key, value in row.items() if not any(part in key for part in timed)} for row in run.rows
        ]
        found[name] = (run, weights, rows)
    (run, weights, rows), (_, others, other_rows) = found["with"], found["without"]
    assert rows == other_rows and [row["step"] for row in rows][:2] == [2, 4]
    assert weights.keys() == others.keys() and all(bool((weights[key] == others[key]).all()) for key in weights)
    assert [row["step"] for row in run.eval_rows] == [2, 4]
    assert run.before is not None and run.after is not None
    steps, values = evaluations_of(run, "avg_at_k")
    assert steps == [0, 2, 4, 5] and values[0] == run.before.avg_at_k.value and values[-1] == run.after.avg_at_k.value
    assert all(row["mel/generated_tokens"] == 8 * row["completions/mean_length"] for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval.every_steps": 0}, "eval.every_steps=0 must be at least 1, or null"),
        ({"eval.with_lessons": True, "train.algorithm": "grpo"}, "eval.with_lessons=true with algorithm='grpo'"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = resolve(preset="cpu", overrides=list(options.items()))
    with pytest.raises(ConfigError, match=message):
        run.check(recipe, tmp_path)


def test_the_adapter_is_saved_before_anything_else_can_go_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, seen = evaluations.evaluate, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        seen.append((tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file())
        if len(seen) == 2:
            raise EngineError("the engine is gone")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(evaluations, "evaluate", broken)
    with pytest.raises(AssertionError):  # exit code 6
        evaluated(tmp_path)
    assert seen == [False, True]


def test_long_prompts_are_dropped(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "qwen3")
    rows = [{"prompt": "x" * n, "answer": "1"} for n in (5, 10, 200, 15)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides: list[tuple[str, Any]] = [
        ("model.name", str(folder)), ("data.train", str(tmp_path / "tasks.jsonl")), ("data.eval", None),
        ("data.conversational", False), ("train.per_device_train_batch_size", 8), ("train.num_generations", 8),
        ("train.gradient_accumulation_steps", 1),
    ]  # fmt: skip
    for limit, dropped in ((None, 0), (100, 1), (12, 2)):
        recipe = resolve(preset="cpu", overrides=[*overrides, ("data.max_prompt_tokens", limit)])
        tasks = run.load_run_tasks(recipe, run.check(recipe, tmp_path / "run"), load_tokenizer(recipe.model))
        assert tasks.dropped_long == dropped and len(tasks.train) == 4 - dropped
        assert tasks.longest_prompt_tokens == (5, 10, 15, 200)[3 - dropped] == max(map(len, tasks.train["prompt"]))


def test_a_run_takes_the_chat_template_of_the_adapter_it_starts_from(tmp_path: Path) -> None:
    spec = ModelSpec(str(save_tiny(tmp_path / "base")))
    adapter = make_adapter(spec, tmp_path / "adapter")
    overrides: list[tuple[str, Any]] = [("model.name", spec.name), ("data.eval", None)]
    (adapter / "chat_template.jinja").write_text("{{ 'own' }}")
    for start, template in ((str(adapter), "{{ 'own' }}"), (None, CHAT_TEMPLATE)):
        recipe = resolve(preset="cpu", overrides=[*overrides, ("lora.start_from", start)])
        assert run.run_tokenizer(recipe).chat_template == template


def test_a_conversation_the_template_rejects_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    text = "(m['content'] if m['role'] != 'tool' else raise_exception('no tools'))"
    picky = CHAT_TEMPLATE.replace("m['content']", text)
    (tmp_path / "base" / "chat_template.jinja").write_text(picky)
    user = {"role": "user", "content": "x"}
    rows = [{"question": [user], "answer": "1"}, {"question": [user, {"role": "tool", "content": "y"}], "answer": "1"}]
    skipped = {"question": [user], "answer": ""}  # the third task is on line 5
    lines = ["", *map(json.dumps, [rows[0], skipped, rows[0], rows[1]])]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (tmp_path / "ok.jsonl").write_text("\n".join([json.dumps(rows[0])] * 8))
    for train, held_out in (("t", None), ("ok", str(tmp_path / "t.jsonl"))):
        overrides: list[tuple[str, Any]] = [
            ("model.name", str(tmp_path / "base")), ("data.train", str(tmp_path / f"{train}.jsonl")),
            ("data.eval", held_out), ("data.eval_split", None), ("lora.start_from", None),
        ]  # fmt: skip
        recipe = resolve(preset="cpu", overrides=overrides)
        with pytest.raises(ModelError, match=r"^t.jsonl, line 5, column 'question': .* no tools"):
            run.load_run_tasks(recipe, run.check(recipe, tmp_path / "run"), run.run_tokenizer(recipe))


@pytest.mark.slow
def test_a_finished_run_has_a_report_with_its_preset_and_stages(tmp_path: Path) -> None:
    shown = evaluated(tmp_path).stdout
    folder = tmp_path / "run"
    assert f"report    {folder / 'report.html'}" in shown
    record = json.loads((folder / "run.json").read_text())
    assert record["preset"] == "cpu" and record["device"].startswith("CPU")
    (session,) = record["sessions"]
    assert set(session["stages_s"]) == {"load", "evaluation", "training", "export"}
    assert all(0 < seconds < 600 for seconds in session["stages_s"].values())
    found = read_run(folder)
    assert found.problems == () and found.finished and found.before is not None and found.after is not None
    page = (folder / "report.html").read_text()
    assert "Avg@2" in page and "Peak memory so far" in page and "<code>cpu</code>" in page
    (memory_gib,) = series(found.rows, "mel/peak_memory_gib")[1]
    assert 0.2 < memory_gib < 64


@pytest.mark.slow
def test_a_start_that_fails_leaves_a_folder_to_start_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ModelError("no weights")

    with monkeypatch.context() as patch, pytest.raises(AssertionError):  # exit code 2
        patch.setattr(run, "load_for_training", broken)
        command(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    command(tmp_path)
    assert (tmp_path / "run" / "run.json").is_file()


@pytest.mark.slow
def test_a_report_that_fails_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, "write_report", broken)
    shown = command(tmp_path).stdout
    assert "no report: OSError: [Errno 28] No space left on device. Try again with: mel-lite report" in shown


def tasks_file(path: Path, numbers: range) -> Path:
    tasks = [{"prompt": f"What is {i} plus 9?", "answer": str(i + 9)} for i in numbers]
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


def test_what_is_evaluated_is_not_trained_on_and_is_stated(tmp_path: Path) -> None:
    base = str(save_tiny(tmp_path / "base"))
    many, few = tasks_file(tmp_path / "many.jsonl", range(120)), tasks_file(tmp_path / "few.jsonl", range(5, 60))

    def loaded(train: Path, held_out: Any) -> tuple[Any, str]:
        overrides: list[tuple[str, Any]] = [
            ("model.name", base), ("lora.start_from", None), ("data.train", str(train)), ("data.eval", held_out),
        ]  # fmt: skip
        recipe = resolve(preset="cpu", overrides=overrides)
        args = run.check(recipe, tmp_path / "run")
        tasks = run.load_run_tasks(recipe, args, run.run_tokenizer(recipe))
        return tasks, "\n".join(tasks.notes)

    tasks, said = loaded(many, "held-out")
    assert (len(tasks.train), len(tasks.held_out)) == (108, 12)
    assert not {str(p) for p in tasks.train["prompt"]} & {str(p) for p in tasks.held_out["prompt"]}
    assert said.startswith("Evaluation before and after training on 12 of the 120 tasks, which are not trained on.")
    tasks, said = loaded(few, "held-out")
    assert len(tasks.train) == 55 and tasks.held_out is None
    assert said.startswith("No evaluation before and after training: 55 tasks are too few to hold some of them out")
    tasks, said = loaded(few, str(many))
    assert len(tasks.train) == 55 and len(tasks.held_out) == 12
    assert "warning: 7 of these 12 tasks are also trained on" in said
    tasks, said = loaded(few, None)
    assert tasks.held_out is None and said == "No evaluation before and after training: data.eval is unset."


def test_evaluation_tasks_are_chosen_by_option_and_a_resumed_run_keeps_its_own(tmp_path: Path) -> None:
    base, many = str(save_tiny(tmp_path / "base")), str(tasks_file(tmp_path / "many.jsonl", range(120)))
    folder = tmp_path / "run"

    def dry(*flags: str) -> str:
        own = ["--gpu", "cpu", "--model", base, "--dataset", many, "--output-dir", str(folder)]
        done = CliRunner().invoke(app, ["train", "--dry-run", *own, *flags])
        return done.output if done.exit_code == 0 else f"{type(done.exception).__name__}: {done.exception}"

    assert "108 training tasks (0 too long), held out: 12." in dry()
    assert "120 training tasks (0 too long), held out: 12." in dry("--eval-dataset", "demo", "--eval-split", "test")
    assert "120 training tasks (0 too long), held out: none." in dry("--eval-dataset", "none")
    for other in ((), ("--eval-dataset", "none"), ("--eval-dataset", "held-out")):
        assert dry("--eval-split", "test", *other).startswith("ConfigError: --eval-split test: name the dataset")
    folder.mkdir()
    stored = resolve(preset="cpu", overrides=[("data.train", many), ("data.eval", None)])
    (folder / "config.yaml").write_text(stored.as_yaml())
    assert "120 training tasks (0 too long), held out: none." in dry("--auto-resume"), "as an older version began it"
    assert "108 training tasks (0 too long), held out: 12." in dry("--auto-resume", "--eval-dataset", "held-out")
