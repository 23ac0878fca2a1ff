"""The command line: its frozen surface, and errors without tracebacks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from click import Context

import mel_lite
from command_line import cold_mel_lite_command, mel_lite_command
from mel_lite.cli.main import app
from mel_lite.lessons.store import ExperienceStore
from tiny_models import save_tiny

SURFACE = Path(__file__).parent / "cli_surface.json"


def surface() -> dict[str, list[str]]:
    """Every command with its options and arguments."""
    found: dict[str, list[str]] = {}

    def walk(command: object, path: str) -> None:
        parameters = [p for p in command.get_params(Context(command)) if p.name != "help"]  # type: ignore[attr-defined]
        found[path] = sorted(" ".join(p.opts) if p.param_type_name == "option" else str(p.name) for p in parameters)
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}")

    walk(typer.main.get_command(app), "mel-lite")
    return found


def test_the_surface_is_frozen() -> None:
    """A changed option breaks scripts: change cli_surface.json only on purpose."""
    assert surface() == json.loads(SURFACE.read_text())


def test_help_loads_nothing_heavy() -> None:
    done = cold_mel_lite_command("--help")
    assert done.returncode == 0 and "train" in done.stdout
    assert mel_lite_command("--help").stdout == done.stdout, "a warm process is the same command"
    heavy = ("torch", "trl", "transformers", "datasets")
    code = f"import mel_lite.cli.main, sys; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_version() -> None:
    assert cold_mel_lite_command("--version").stdout.strip() == f"mel-lite {mel_lite.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("train",), "No preset or config given. Use --gpu", 2),
        (("train", "--gpu", "23gb"), "Did you mean '24gb'?", 2),
        (("train", "--gpu", "cpu", "--set", "train.lerning_rate=1"), "Did you mean 'learning_rate'?", 2),
        (("train", "--gpu", "cpu", "--set", "train.num_generations=null", "--dry-run"), "num_generations=None", 2),
        (("plan", "--gpu", "24gb", "--set", "train.num_generations=null"), "train.num_generations=None must be", 2),
        (("train", "--gpu", "cpu", "--model", "./nowhere", "--dry-run"), "no such folder", 2),
        (("train", "--gpu", "cpu", "--dataset", "none.jsonl", "--dry-run"), "none.jsonl", 2),
        (("train", "--gpu", "cpu", "--resume", "--output-dir", "nowhere"), "holds no run", 2),
        (("train", "--gpu", "cpu", "--allow-change", "dataset"), "--allow-change dataset without --resume", 2),
        (("experiences", "list"), "There is no run in runs/", 2),
        (("experiences", "list", "--run", "nowhere"), "nowhere", 2),
        (("experiences", "list", "--run", ".", "--status", "good"), "--status 'good' is not one of", 2),
        (("export", "nowhere"), "nowhere", 2),
        (("eval",), "nothing to evaluate", 2),
        (("eval", "--model", "./nowhere"), "no such folder", 2),
    ],
)
def test_bad_input_ends_with_a_message_and_no_traceback(
    tmp_path: Path, arguments: tuple[str, ...], message: str, code: int
) -> None:
    done = mel_lite_command(*arguments, cwd=tmp_path)
    shown = re.sub(r"\s+", " ", done.stderr)
    assert message in shown and done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not any(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_an_output_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    done = mel_lite_command("train", "--gpu", "cpu", "--output-dir", folder)
    assert "is not empty" in done.stderr and done.returncode == 2
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_empty_store_lists_nothing(tmp_path: Path) -> None:
    ExperienceStore(tmp_path / "experiences.sqlite").close()
    done = mel_lite_command("experiences", "list", "--run", tmp_path)
    assert done.returncode == 0 and "0 meta-experiences" in done.stdout


def test_every_command_that_reads_tasks_has_the_options_its_errors_name(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"query": "2+2?", "target": "4"}\n' * 2)
    file, base = str(tmp_path / "t.jsonl"), str(save_tiny(tmp_path / "base"))
    recipe = ("--set", f"model.name={base}", "--set", "lora.start_from=null", "--dry-run")
    commands = {
        "train": ("train", "--gpu", "cpu", "--dataset", file, *recipe),
        "eval": ("eval", "--model", base, "--dataset", file),
        "warmup": ("warmup", file, "--output-dir", str(tmp_path / "out"), "--model", base),
    }
    for name, arguments in commands.items():
        done = mel_lite_command(*arguments)
        flags = re.findall(r"--[a-z]+-column", done.stderr)
        assert done.returncode != 0 and flags, done.stderr
        assert set(flags) <= set(surface()[f"mel-lite {name}"])


def test_eval_reads_own_columns_and_template_variables(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"query": "2+2?", "target": "4"}\n')
    base, output = save_tiny(tmp_path / "base"), tmp_path / "result.json"
    options = ("--prompt-column", "query", "--answer-column", "target", "--k", "1", "--max-new-tokens", "2")
    arguments = (
        "eval",
        "--model",
        str(base),
        "--dataset",
        str(tmp_path / "t.jsonl"),
        *options,
        "--output",
        str(output),
    )
    done = mel_lite_command(*arguments, "--chat-template-kwargs", "{enable_thinking: false}")
    assert done.returncode == 0 and json.loads(output.read_text())["n"] == 1, done.stderr
    for text in ("[1]", "{", "5"):
        done = mel_lite_command(*arguments, "--chat-template-kwargs", text)
        assert done.returncode == 2 and f"--chat-template-kwargs {text!r}" in done.stderr
