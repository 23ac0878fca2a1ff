"""`mel-lite chat`: base and trained answer the same questions; what cannot be asked is one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from typer.testing import CliRunner

from mel_lite.cli.main import app
from mel_lite.engines.base import Sampling
from mel_lite.errors import ConfigError, MelLiteError, ModelError
from mel_lite.models.load import ModelSpec
from mel_lite.run.chat import Talk, answers_text, answers_view, find_speaker, load_talk
from mel_lite.run.folder import process_using
from run_folders import make_run
from tiny_adapters import make_adapter
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose adapter changes what its tiny base says."""
    folder = tmp_path_factory.mktemp("chat")
    base = save_tiny(folder / "base")
    run = make_run(folder / "run", lessons=0)
    (run / "adapter").rmdir()
    make_adapter(ModelSpec(str(base)), run / "adapter")
    return run


@pytest.fixture(scope="module")
def talk(run_dir: Path) -> Talk:
    return load_talk(find_speaker(run_dir), Sampling(8, 0.0), seed=1)


def invoke(*arguments: object, text: str = "") -> str:
    """Output of a command that succeeds. A user error is raised as it is."""
    done = CliRunner().invoke(app, ["chat", *map(str, arguments)], input=text)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_each_side_is_the_greedy_answer_of_its_model(talk: Talk) -> None:
    talk.start_over()
    answers = talk.answer("What is 2 plus 2?")
    prompt = torch.tensor([talk._ids([{"role": "user", "content": "What is 2 plus 2?"}])])
    for side in ("base", "trained"):
        ids = prompt
        with torch.no_grad(), talk.model.disable_adapter() if side == "base" else torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, talk.model(ids).logits[:, -1:].argmax(-1)], dim=1)
        wanted = talk.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert answers[side] == wanted
    assert answers["base"] != answers["trained"]


def test_a_talk_goes_on_until_it_starts_over(talk: Talk) -> None:
    talk.start_over()
    first = talk.answer("one")
    talk.answer("two")
    assert [turn["content"] for turn in talk.turns["trained"]][:3] == ["one", first["trained"], "two"]
    talk.start_over()
    assert talk.answer("one") == first
    talk.context_tokens, kept = len(talk._ids([{"role": "user", "content": "three"}])) + 8, talk.context_tokens
    talk.answer("three")
    assert [turn["content"] for turn in talk.turns["base"]][:1] == ["three"], "earlier turns no longer fit"
    with pytest.raises(ConfigError, match="Shorten it, or lower --max-new-tokens"):
        talk.answer("a much longer question than there is room for " * 4)
    talk.context_tokens = kept


def test_a_pipe_asks_line_by_line_and_once_asks_once(run_dir: Path) -> None:
    once = invoke(run_dir, "--once", "one", "--max-new-tokens", 4)
    assert [line.split(":")[0] for line in once.splitlines()] == ["base", "trained"]
    piped = invoke(run_dir, "--max-new-tokens", 4, text="one\n\n/new\none\n/quit\ntwo\n")
    assert piped == once * 2


def test_the_runs_system_prompt_is_used(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("system_prompt: null", "system_prompt: Be brief."))
    assert find_speaker(run_dir).system_prompt == find_speaker(run_dir / "adapter").system_prompt == "Be brief."
    assert find_speaker(run_dir, system_prompt="Be long.").system_prompt == "Be long."
    (run_dir / "config.yaml").write_text(config)


def test_answers_stand_side_by_side_where_there_is_room() -> None:
    answers = {"base": "left [red] \x1b[2J", "trained": "right"}
    for width, rows in ((100, 1), (40, 2)):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))
        console.print(answers_view(answers, width))
        titles = [line for line in console.export_text().splitlines() if "base" in line or "trained" in line]
        assert len(titles) == rows, titles
    assert list(answers_text(answers)) == ["base: left [red] \N{REPLACEMENT CHARACTER}[2J", "trained: right"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run / "missing", "there is no such folder"),
        (lambda run: (run / "adapter" / "adapter_config.json").unlink(), "holds no adapter"),
        (lambda run: (run / "adapter").rename(run / "model"), "was trained without LoRA"),
        (lambda run: (run.parent / "base").rename(run.parent / "moved"), "no such folder. Check the path"),
    ],
)
def test_what_cannot_be_asked_is_one_line(tmp_path: Path, change: object, message: str) -> None:
    base = save_tiny(tmp_path / "base")
    run = make_run(tmp_path / "run", lessons=0)
    (run / "adapter").rmdir()
    make_adapter(ModelSpec(str(base)), run / "adapter")
    changed = change(run)  # type: ignore[operator]
    folder = changed if isinstance(changed, Path) and changed.name == "missing" else run
    with pytest.raises((ConfigError, ModelError), match=message) as caught:
        invoke(folder, "--once", "one")
    assert "\n" not in str(caught.value)


def test_a_moved_base_can_be_named(run_dir: Path) -> None:
    base = run_dir.parent / "base"
    base.rename(run_dir.parent / "elsewhere")
    try:
        with pytest.raises(MelLiteError):
            find_speaker(run_dir)
        assert find_speaker(run_dir, str(run_dir.parent / "elsewhere")).base.name.endswith("elsewhere")
    finally:
        (run_dir.parent / "elsewhere").rename(base)


def test_a_run_that_trains_is_left_alone(run_dir: Path) -> None:
    with FileLock(run_dir / ".lock"):
        (run_dir / ".lock").write_text("4711\n")
        with pytest.raises(ConfigError, match=r"still training \(pid 4711\). Wait for its end, or name a"):
            invoke(run_dir, "--once", "one")
        assert find_speaker(run_dir / "adapter").adapter.name == "adapter", "a folder in it can be asked"
        assert (run_dir / ".lock").read_text() == "4711\n"
    assert process_using(run_dir) is None


def test_an_empty_question_is_refused() -> None:
    with pytest.raises(ConfigError, match="--once is empty"):
        invoke("demo", "--once", " ")
