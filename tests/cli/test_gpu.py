"""`mel-lite plan`, and the plan that `mel-lite train` makes before it loads anything."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from mel_lite.cli import gpu as gpu_commands
from mel_lite.cli.main import app
from mel_lite.errors import ConfigError
from mel_lite.memory import plan as planning
from mel_lite.memory.plan import BUDGETS
from mel_lite.recipe import Recipe, resolve
from plans import planned, with_vllm


@pytest.mark.parametrize("text", ["train: 3\n", "train: [1, 2]\n", "model: x\n"])
@pytest.mark.parametrize("command", ["plan", "train"])
def test_a_file_of_another_form_is_refused_in_words(command: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    done = CliRunner().invoke(app, [command, "--gpu", "24gb", "--config", str(tmp_path / "bad.yaml")])
    assert isinstance(done.exception, ConfigError) and "it must hold `key: value` lines" in str(done.exception)


def test_the_command_prints_json_and_its_exit_code_says_whether_it_fits() -> None:
    done = CliRunner().invoke(app, ["plan", "--gpu", "24gb", "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["fits"] is True and found["budget_bytes"] == BUDGETS["24gb"]
    assert found["peak_bytes"] == with_vllm("24gb")[1].peak_bytes, "as on a machine with the extra gpu"
    assert found["engine"]["vllm"] is True and "model.gpu_memory_utilization" in found["choices"]
    other = json.loads(CliRunner().invoke(app, ["plan", "--gpu", "24gb", "--engine", "hf", "--json"]).stdout)
    assert other["peak_bytes"] == planned("24gb")[1].peak_bytes and other["engine"]["engine"] == "hf"
    assert "train.max_cache_tokens" in other["choices"]
    assert {"name", "bytes"} <= set(found["phases"][0]) and found["choices"]["train.max_completion_length"] == 2048
    refused = CliRunner().invoke(app, ["plan", "--gpu", "12gb", "--model", "Qwen/Qwen3-14B", "--json"])
    assert isinstance(refused.exception, ConfigError) and refused.exception.exit_code == 2
    assert json.loads(refused.stdout)["fits"] is False
    typo = CliRunner().invoke(app, ["plan", "--gpu", "24gb", "--set", "train.max_completon_length=9"])
    assert "Did you mean 'max_completion_length'" in str(typo.exception)
    typo = CliRunner().invoke(app, ["plan", "--gpu", "24gb", "--set", "train.temperature=warm"])
    assert isinstance(typo.exception, ConfigError) and "train.temperature='warm' is not a number" in str(typo.exception)


def test_train_refuses_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "--gpu", "12gb", "--model", "Qwen/Qwen3-14B-Base"])
    assert isinstance(done.exception, ConfigError) and "does not fit 12gb" in str(done.exception)
    assert "predicted GPU memory" in done.stderr and not any(tmp_path.iterdir())


def trained_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Recipe, Any]:
    """The recipe and the budget that `mel-lite train` passes to the run."""
    from mel_lite.run import train as run

    seen: list[tuple[Recipe, Any]] = []
    monkeypatch.setattr(run, "train", lambda recipe, folder, **options: seen.append((recipe, options["budget_bytes"])))
    done = CliRunner().invoke(app, ["train", *arguments])
    assert done.exit_code == 0, done.output
    return seen[0]


def test_a_run_on_the_cpu_is_not_planned_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: pytest.fail("a CUDA context for a run on the CPU"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (tmp_path / "cpu.yaml").write_text("train: {use_cpu: true}\n")
    for says in (("--set", "train.use_cpu=true"), ("--config", str(tmp_path / "cpu.yaml"))):
        recipe, budget = trained_with(monkeypatch, "--gpu", "24gb", *says, "--output-dir", str(tmp_path / "run"))
        assert budget is None and recipe.train["use_cpu"] and recipe.model.gpu_memory_utilization is None
        done = CliRunner().invoke(app, ["train", "--gpu", "auto", *says])
        assert isinstance(done.exception, ConfigError) and "auto needs a GPU. Use --gpu cpu" in str(done.exception)


def test_a_run_on_the_cpu_is_planned_for_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refused = CliRunner().invoke(app, ["train", "--gpu", "cpu-1gb", "--output-dir", str(folder)])
    assert isinstance(refused.exception, ConfigError) and "does not fit cpu-1gb" in str(refused.exception)
    assert "predicted memory" in refused.stderr and not folder.exists()
    recipe, budget = trained_with(monkeypatch, "--gpu", "cpu-3gb", "--output-dir", str(folder))
    assert budget == 3 * 10**9 and recipe.train["max_micro_batch_tokens"] == 512
    folder.mkdir()
    stored = resolve(preset="cpu", overrides=[("train.max_micro_batch_tokens", 1024)])  # as runs of older releases
    (folder / "config.yaml").write_text(stored.as_yaml())
    again, _ = trained_with(monkeypatch, "--gpu", "cpu-4gb", "--resume", "--output-dir", str(folder))
    assert again.train["max_micro_batch_tokens"] == 1024, "its remaining steps are rounded as before"


def test_expandable_segments_are_disabled_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's sleep mode does not support them, and the allocator reads its options once."""
    name, found = "PYTORCH_CUDA_ALLOC_CONF", ["unsloth", "vllm"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package in found or None)
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    monkeypatch.setattr(planning, "plan_for", lambda *_, **__: pytest.fail(f"read {os.environ[name]}"))
    with pytest.raises(pytest.fail.Exception, match="read max_split_size_mb:64$"):
        gpu_commands.planned("24gb", None, [])
    monkeypatch.setenv(name, "expandable_segments:True")
    found.remove("vllm")
    with pytest.raises(pytest.fail.Exception, match="read expandable_segments:True$"):
        gpu_commands.planned("24gb", None, [])


def test_a_resumed_run_keeps_what_a_plan_had_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Free memory today does not matter: the checkpoint was written with these settings."""
    (tmp_path / "run").mkdir()
    changes = [("train.num_generations", 4), ("train.per_device_train_batch_size", 32), ("train.optim", "adamw_torch")]
    began = resolve(preset="24gb", overrides=[*changes, ("train.max_context_tokens", 4096)])
    (tmp_path / "run" / "config.yaml").write_text(began.as_yaml())
    arguments = ("--gpu", "24gb", "--resume", "--output-dir", str(tmp_path / "run"))
    recipe, budget = trained_with(monkeypatch, *arguments)
    assert budget == BUDGETS["24gb"]
    for key, value in (*changes, ("train.max_context_tokens", 4096)):
        assert recipe.train[key.partition(".")[2]] == value
    again, _ = trained_with(monkeypatch, *arguments, "--set", "train.max_context_tokens=3072")
    assert again.train["max_context_tokens"] == 3072, "except options given now"
    (tmp_path / "mine.yaml").write_text("train: {learning_rate: 2.0e-5, optim: adamw_bnb_8bit}\n")
    again, _ = trained_with(monkeypatch, *arguments, "--config", str(tmp_path / "mine.yaml"))
    assert again.train["num_generations"] == 4 and again.train["optim"] == "adamw_bnb_8bit", "and in a file"


def test_a_measurement_that_is_interrupted_ends_with_a_message_and_leaves_stdout_to_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("model: {name: demo}\n")
    for as_json, shown in ((True, ""), (False, "a table\n")):
        flags = {"train.max_steps": ("--max-steps", 3)}
        with (
            pytest.raises(typer.Exit) as ended,
            gpu_commands.measured_recipe(None, tmp_path / "mine.yaml", flags, None, as_json=as_json) as recipe,
        ):
            assert (recipe.model.name, recipe.train["max_steps"]) == ("demo", 3)
            print("a table")
            raise KeyboardInterrupt
        written = capsys.readouterr()
        assert ended.value.exit_code == 130 and written.out == shown
        assert "interrupted; nothing was measured to the end" in written.err
    with (
        pytest.raises(ConfigError, match="No preset or config given"),
        gpu_commands.measured_recipe(None, None, {}, None, as_json=True),
    ):
        pass
