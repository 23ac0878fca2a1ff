"""`mel-lite train` on a tiny model: tasks, the worst step, evaluations and the saved adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mel_lite.errors import EngineError, ModelError
from mel_lite.models.load import ModelSpec, load_tokenizer
from mel_lite.recipe import resolve
from mel_lite.report.runs import read_run, series
from mel_lite.resilience import worst_step as worst_step_module
from mel_lite.run import finish
from mel_lite.run import train as run
from tiny_adapters import make_adapter
from tiny_models import CHAT_TEMPLATE, save_tiny
from train_command import command


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


def test_the_evaluation_waits_for_the_worst_step_and_its_tokens_are_not_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for module, name in ((worst_step_module, "worst_step"), (run, "evaluate"), (run.MELTrainer, "training_step")):
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
    assert "Pass@1" in evaluated(tmp_path, **options).stdout
    before = tmp_path / "run" / "eval" / "before.json"
    began = before.read_text()
    assert "Pass@1" in evaluated(tmp_path, "--resume", train__max_steps=2, **options).stdout
    assert before.read_text() == began, "read, not measured again"
    before.unlink()
    assert "Pass@1" not in evaluated(tmp_path, "--resume", train__max_steps=3, **options).stdout
    assert not before.is_file()


def test_the_adapter_is_saved_before_anything_else_can_go_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, seen = run.evaluate, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        seen.append((tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file())
        if len(seen) == 2:
            raise EngineError("the engine is gone")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(run, "evaluate", broken)
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


def test_a_start_that_fails_leaves_a_folder_to_start_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ModelError("no weights")

    with monkeypatch.context() as patch, pytest.raises(AssertionError):  # exit code 2
        patch.setattr(run, "load_for_training", broken)
        command(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    command(tmp_path)
    assert (tmp_path / "run" / "run.json").is_file()


def test_a_report_that_fails_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, "write_report", broken)
    shown = command(tmp_path).stdout
    assert "no report: OSError: [Errno 28] No space left on device. Try again with: mel-lite report" in shown
