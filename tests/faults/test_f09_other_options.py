"""F9: resuming with other options or inputs: only another split of the same batch is accepted."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from mel_lite.errors import ConfigError, ModelError
from mel_lite.recipe import resolve
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.resume_checks import FREE, INPUTS, NEVER, changes
from mel_lite.run.train import _can_resume
from tiny_models import save_tiny
from trainers import assert_learned, build, run_state, step_log, sums

COMMON: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0.0}


class LastGradient(TrainerCallback):
    """Records the whole gradient of the last update."""

    def __init__(self) -> None:
        self.gradient: torch.Tensor = torch.zeros(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def split(rows: int, accumulated: int) -> dict[str, Any]:
    return COMMON | {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Uninterrupted run with one micro-batch of 8, and all its checkpoints."""
    folder, last = tmp_path_factory.mktemp("whole"), LastGradient()
    trainer = build(folder, **split(8, 1), callbacks=[last])
    trainer.train()
    assert_learned(trainer)
    return folder, trainer, last.gradient


def begun(whole: Any, folder: Path, *, steps: int = 2) -> None:
    """Copy the run as it was after the given number of steps."""
    shutil.copytree(whole[0] / "base", folder / "base")
    shutil.copytree(whole[0] / "run", folder / "run")
    for saved in checkpoint_files.committed(folder / "run")[steps:]:
        shutil.rmtree(saved)


@pytest.mark.parametrize(("rows", "accumulated"), [(4, 2), (2, 4)])
def test_another_split_of_the_batch_has_the_same_gradients(
    tmp_path: Path, whole: Any, rows: int, accumulated: int
) -> None:
    begun(whole, tmp_path)
    last = LastGradient()
    resumed = build(tmp_path, **split(rows, accumulated), callbacks=[last])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and resumed._step == 3 * accumulated
    size = whole[2].norm()
    assert size > 1e-2 and (last.gradient - whole[2]).norm() <= 1e-6 * size
    assert run_state(resumed)["tokens"] == run_state(whole[1])["tokens"], "the same texts were sampled"
    written = [
        [(row.step, row.analysis, row.status, row.replay_verdicts) for row in trainer.store.list()]
        for trainer in (resumed, whole[1])
    ]
    assert written[0] == written[1] and written[0]
    for one, other in zip(step_log(tmp_path / "run"), step_log(whole[0] / "run"), strict=True):
        assert one["reward"] == other["reward"] and one["mel/trained_tokens"] == other["mel/trained_tokens"]


def recipe(**train: Any) -> Any:
    return resolve(preset="cpu", overrides=[(f"train.{name}", value) for name, value in train.items()])


def test_options_that_change_a_run() -> None:
    began = recipe(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    same = recipe(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert changes(began, began) == [] and changes(began, same) == []
    assert changes(recipe(learning_rate=1e-5), recipe(learning_rate="1e-5")) == [], "as given on a command line"
    assert [str(change) for change in changes(recipe(learning_rate=1e-5), recipe(learning_rate="2e-5"))] == [
        "train.learning_rate: 1e-05 -> '2e-5'"
    ]
    assert changes(began, recipe(per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=99)) == []
    other = recipe(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert [str(change) for change in changes(began, other)] == ["train.per_device_train_batch_size: 8 -> 4"]
    # The same update, but twice as many completions sampled before it.
    ahead = recipe(per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=8)
    assert {change.key for change in changes(began, ahead)} == {
        "train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.steps_per_generation",
    }  # fmt: skip
    for option, value in (("loss_type", "bnpo"), ("top_entropy_quantile", 0.2)):
        pair = [
            recipe(**{option: value}, per_device_train_batch_size=n, gradient_accumulation_steps=16 // n)
            for n in (8, 4)
        ]
        assert len(changes(*pair)) == 2, f"{option}={value}: the loss depends on the split"
    other_engine = resolve(preset="cpu", overrides=[("model.engine", "hf"), ("model.gpu_memory_utilization", 0.4)])
    assert changes(resolve(preset="cpu"), other_engine) == [], "a run whose engine failed may resume with another"
    model = resolve(preset="cpu", overrides=[("lora.r", 4), ("train.seed", 1), ("model.name", "x"), ("eval.k", 2)])
    assert [str(change) for change in changes(resolve(preset="cpu"), model)] == [
        "model.name: 'demo' -> 'x'", "lora.r: 8 -> 4", "lora.start_from: 'demo' -> None", "train.seed: 42 -> 1",
        "train.templates: 'demo' -> None",
    ]  # fmt: skip

    old, new = recipe(mel_train_on="experience"), recipe(internalisation="experience")
    assert changes(old, new) == [] == changes(new, old), "the option's old name"
    assert [str(change) for change in changes(old, recipe(internalisation="both"))] == [
        "train.internalisation: 'experience' -> 'both'"
    ]


REFUSAL = """\
--resume: the run in {folder} was started with other values:
  lora.r: 8 -> 4
  train.learning_rate: 1e-05 -> 2e-05
Resuming with them would give a different run. Either restore the old value, or allow the change with \
--allow-change train.learning_rate, or start a new run with --adapter and another --output-dir."""


def test_the_error_names_each_field_with_both_values(tmp_path: Path) -> None:
    began = recipe(learning_rate=1e-5)
    (tmp_path / "config.yaml").write_text(began.as_yaml())
    asked = resolve(preset="cpu", overrides=[("train.learning_rate", 2e-5), ("lora.r", 4)])
    with pytest.raises(ConfigError) as refused:
        _can_resume(asked, tmp_path, Console(quiet=True))
    assert str(refused.value) == REFUSAL.format(folder=tmp_path)


def test_an_allowed_change_is_accepted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text(recipe(learning_rate=1e-5).as_yaml())
    asked = recipe(learning_rate=2e-5)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.resume_checks"):
        assert _can_resume(asked, tmp_path, Console(quiet=True), ["train.learning_rate"]) is False  # no checkpoint yet
    assert "Resuming with a changed option (allowed): train.learning_rate: 1e-05 -> 2e-05" in caplog.text
    both = recipe(learning_rate=2e-5, seed=3)
    with pytest.raises(ConfigError, match=r"train\.seed: 42 -> 3") as refused:
        _can_resume(both, tmp_path, Console(quiet=True), ["train.learning_rate"])
    assert "learning_rate" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.learning_rat", r"no such option or input. Did you mean 'train.learning_rate'\?"),
        ("lora.r", "would not fit. Start a new run"),
        ("train.optim", "would not fit. Start a new run"),
    ],
)
def test_what_cannot_be_allowed(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(recipe().as_yaml())
    with pytest.raises(ConfigError, match=words):
        _can_resume(recipe(), tmp_path, Console(quiet=True), [name])
    assert "max_steps" in FREE and "lora.dropout" not in NEVER


# ---- inputs, compared when a checkpoint is loaded ----


def other_dataset(folder: Path) -> dict[str, Any]:
    return {"train_dataset": sums(25)}


def other_answer(folder: Path) -> dict[str, Any]:
    return {"train_dataset": sums().map(lambda row, i: {"answer": "0" if i == 5 else row["answer"]}, with_indices=True)}


def other_texts(folder: Path) -> dict[str, Any]:
    (folder / "texts.yaml").write_text("analysis_system: Be brief.\n")
    return {"templates": str(folder / "texts.yaml")}


def other_batch(folder: Path) -> dict[str, Any]:
    return split(8, 2)


@pytest.mark.parametrize(
    ("change", "named", "values"),
    [
        (other_dataset, "dataset", ["24 rows, sha256 ", "25 rows, sha256 "]),
        (other_answer, "dataset", ["24 rows, sha256 ", "24 rows, sha256 "]),
        (other_texts, "templates", ["'short+fork, sha256 ", "'custom-"]),
        (other_batch, "batch", ["8 completions per update", "16 completions per update"]),
    ],
)
def test_other_inputs_are_refused_unless_allowed(
    tmp_path: Path, whole: Any, change: Any, named: str, values: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    begun(whole, tmp_path)
    options = split(8, 1) | change(tmp_path)
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError) as refused:
        build(tmp_path, **options).train(resume_from_checkpoint=True)
    text = str(refused.value)
    assert f"\n  {named}: " in text and f"--allow-change {named}" in text
    assert values[0] in text.split("->")[0] and values[1] in text.split("->")[1], text
    assert sorted((tmp_path / "run").rglob("*")) == before, "nothing was touched"
    resumed = build(tmp_path, **options)
    with caplog.at_level(logging.WARNING, "mel_lite.resilience.resume_checks"):
        resumed.train(resume_from_checkpoint=True, allow_change=[named])
    assert f"Resuming with a changed option (allowed): {named}: " in caplog.text
    assert resumed.state.global_step == 3 and resumed._inputs[named] != whole[1]._inputs[named]
    assert_learned(resumed)


def test_another_chat_template_dtype_or_base_is_refused(tmp_path: Path, whole: Any) -> None:
    begun(whole, tmp_path)
    trainer = build(tmp_path, **split(8, 1))
    trainer._tokenizer.chat_template = trainer._tokenizer.chat_template + " "
    with pytest.raises(ConfigError, match="chat_template: 'sha256 .*' -> 'sha256 .*'"):
        trainer.train(resume_from_checkpoint=True)
    trainer = build(tmp_path, **split(8, 1))
    trainer.model.get_base_model().to(torch.bfloat16)
    with pytest.raises(ConfigError, match="dtype: 'float32, mixed precision no' -> 'bfloat16, mixed precision no'"):
        trainer.train(resume_from_checkpoint=True)
    save_tiny(tmp_path / "base", seed=5)
    with pytest.raises(ModelError, match="on another base it is meaningless"):
        build(tmp_path, **split(8, 1)).train(resume_from_checkpoint=True)
    assert set(INPUTS) == set(trainer._inputs)


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same run with analysis prompts as older versions had them."""
    folder = tmp_path_factory.mktemp("unmarked")
    trainer = build(folder, **split(8, 1), mark_fork=False)
    trainer.train()
    return folder, trainer


def test_a_checkpoint_of_an_older_version_is_accepted(tmp_path: Path, whole: Any, unmarked: Any) -> None:
    """A checkpoint without recorded inputs, like plain TRL's; its analysis prompts had no marks."""
    begun(unmarked, tmp_path)
    newest = checkpoint_files.committed(tmp_path / "run")[-1]
    state = json.loads((newest / checkpoint_files.STATE).read_text())
    for name in ("inputs", "steps_per_generation"):
        del state[name]
    (newest / checkpoint_files.STATE).write_text(json.dumps(state))
    (newest / checkpoint_files.MANIFEST).unlink()
    resumed = build(tmp_path, **split(8, 1) | {"train_dataset": sums(24)})
    resumed.train(resume_from_checkpoint=str(newest))
    assert run_state(resumed) == run_state(unmarked[1]) != run_state(whole[1])


def test_a_run_that_began_without_marks_continues_without_them(tmp_path: Path, whole: Any, unmarked: Any) -> None:
    begun(unmarked, tmp_path)
    resumed = build(tmp_path, **split(8, 1))
    assert resumed.lesson_context.mark_fork
    resumed.train(resume_from_checkpoint=True)
    assert run_state(resumed) == run_state(unmarked[1]) != run_state(whole[1])
    assert {row.templates_version for row in resumed.store.list()} == {"short"}


def test_a_run_that_began_with_marks_is_not_resumed_without_them(tmp_path: Path, whole: Any) -> None:
    begun(whole, tmp_path)
    assert {row.templates_version for row in whole[1].store.list()} == {"short+fork"}
    with pytest.raises(ConfigError, match=r"templates: 'short\+fork, sha256 .*' -> 'short, sha256 "):
        build(tmp_path, **split(8, 1), mark_fork=False).train(resume_from_checkpoint=True)
