"""The command line: its frozen surface, and errors without tracebacks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from click import Context
from typer.testing import CliRunner

import mel_lite
from command_line import cold_mel_lite_command, mel_lite_command
from mel_lite.cli.main import ALSO, app
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


def test_the_ways_of_other_commands_work_here_too() -> None:
    run = CliRunner().invoke
    assert "--system-prompt" in run(app, ["train", "-h"]).stdout
    assert run(app, ["-V"]).stdout == f"mel-lite {mel_lite.__version__}\n"
    for verb, command in ALSO.items():
        shown, wanted = (run(app, [name, "-h"]) for name in (verb, command))
        assert wanted.exit_code == 0 and shown.stdout == wanted.stdout and f"mel-lite {command}" in wanted.stdout


def test_a_shell_completes_options_and_their_values() -> None:
    for line, found in {
        "mel-lite tr": "train",
        "mel-lite train --gpu rt": "",
        "mel-lite train --gpu a100": "a100",
        "mel-lite train --verifier ma": "math",
        "mel-lite train --learning-": "--learning-rate",
        "mel-lite export --format q4": "q4_k_m",
    }.items():
        environment = {"_MEL_LITE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
        shown = CliRunner().invoke(app, env=environment, prog_name="mel-lite").stdout
        assert re.findall(r'"([\w-]+)"', shown)[:1] == ([found] if found else []), shown


def test_flags_of_train_are_options_of_the_recipe(tmp_path: Path) -> None:
    """In a dry run, which checks them as a run does."""
    base = save_tiny(tmp_path / "base")
    (tmp_path / "t.jsonl").write_text("".join(f'{{"prompt": "{i}+2?", "answer": "{i + 2}"}}\n' for i in range(8)))
    flags = {
        "--verifier": ("exact", "train.verifier", "exact"),
        "--system-prompt": ("Be brief.", "data.system_prompt", "Be brief."),
        "--seed": ("7", "train.seed", 7),
        "--limit": ("5", "data.limit", 5),
        "--learning-rate": ("2e-6", "train.learning_rate", 2e-6),
        "--report-to": ("tensorboard", "train.report_to", "tensorboard"),
    }
    given = [part for flag, (text, _, _) in flags.items() for part in (flag, text)]
    done = mel_lite_command(
        "train", "--gpu", "cpu", "--model", base, "--dataset", tmp_path / "t.jsonl", "--dry-run", "--no-load-in-4bit",
        *given,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load(done.stdout)
    for _, key, value in flags.values():
        section, _, name = key.partition(".")
        assert recipe[section][name] == value, key
    assert recipe["model"]["load_in_4bit"] is False and "5 training tasks" in done.stdout


def test_a_card_gives_a_preset_and_a_line_about_it() -> None:
    done = mel_lite_command("plan", "--gpu", "rtx4090", "--json")
    assert json.loads(done.stdout)["gpu"] == "24gb" and done.returncode == 0
    assert done.stderr == "--gpu rtx4090: a card with 24 GB, so the preset is 24gb.\n"


def test_version() -> None:
    assert cold_mel_lite_command("--version").stdout.strip() == f"mel-lite {mel_lite.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("train",), "No preset or config given. Use --gpu", 2),
        (("train", "--gpu", "24g"), "Did you mean '24gb'?", 2),
        (("plan", "--gpu", "rtx4009"), "Did you mean '4090'?", 2),
        (("train", "--gpu", "8gb"), "8 GB is less than the smallest preset takes. Use --gpu 12gb", 2),
        (("train", "--gpu", "cpu", "--report-to", "wandbb", "--dry-run"), "Did you mean 'wandb'?", 2),
        (("train", "--gpu", "cpu", "--report-to", "neptune", "--dry-run"), "the package is not installed", 2),
        (("train", "--gpu", "cpu", "--verifier", "maths", "--dry-run"), "Did you mean 'math'?", 2),
        (("train", "--gpu", "cpu", "--limit", "0", "--dry-run"), "limit = 0: keep at least 1 row", 2),
        (("train", "--gpu", "cpu", "--seed", "1", "--set", "train.seed=2"), "--seed 1 and --set train.seed=2 set", 2),
        (("probe", "--gpu", "cpu", "--model", "a/b", "--set", "model.name=b/c"), "--model a/b and --set model.name", 2),
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


@pytest.mark.slow
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
