"""`mel-lite probe`: weights stay, counts are those of the store and the engine, and bad input is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from mel_lite import MELConfig
from mel_lite.cli.main import app
from mel_lite.errors import ConfigError, DataError
from mel_lite.recipe import resolve
from mel_lite.run.probe import run as probe_module
from mel_lite.run.probe.advice import NO_HELP
from mel_lite.run.probe.measure import measure, rates
from mel_lite.run.probe.result import Attempts, ProbeResult
from mel_lite.run.probe.run import probe, probe_options
from mel_lite.types import Group, Rollout, Verdict
from probes import build_probe
from tiny_models import save_tiny
from trainers import digest
from warm_pool import warm_verifiers

RIGHT, WRONG, ABSTAIN = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN


def all_weights(trainer: Any) -> str:
    return digest({name: weight.detach() for name, weight in trainer.model.named_parameters()})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProbeResult, Any]:
    """A measurement, and what was seen: weights before and after, the rows of each micro-batch, and the engine."""
    trainer = build_probe(tmp_path_factory.mktemp("probe"))
    seen = SimpleNamespace(before=all_weights(trainer), rows=[], engine=trainer.engine.unmetered, trainer=trainer)
    original = trainer._compute_loss

    def spy(model: Any, inputs: Any) -> Any:
        seen.rows.append({tuple(ids[ids != 0].tolist()) for ids in inputs["prompt_ids"]})
        return original(model, inputs)

    trainer._compute_loss = spy
    result = measure(trainer, attempts=4)
    seen.after = all_weights(trainer)
    return result, seen


def test_no_weight_is_changed(measured: tuple[ProbeResult, Any]) -> None:
    _, seen = measured
    assert seen.before == seen.after
    assert all(weight.grad is None for weight in seen.trainer.model.parameters())
    assert seen.trainer.state.global_step == 0


def test_a_micro_batch_has_the_rows_of_one_prompt(measured: tuple[ProbeResult, Any]) -> None:
    _, seen = measured
    assert len(seen.rows) >= 12 and all(len(prompts) == 1 for prompts in seen.rows)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(measured: tuple[ProbeResult, Any], tmp_path: Path) -> None:
    result, _ = measured
    again = measure(build_probe(tmp_path), attempts=4)
    assert again.to_json() == result.to_json()
    assert {way.name for way in result.ways if way.cosine is not None} > {"policy loss", "analysis", "credit"}


def test_the_counts_are_those_of_the_store_and_the_engine(measured: tuple[ProbeResult, Any]) -> None:
    result, seen = measured
    rows = seen.trainer.store.list()
    lessons = result.lessons
    assert lessons.written == len(rows) == 3 and lessons.kept == sum(row.status == "kept" for row in rows)
    assert result.prompts == 12 and result.lesson_prompts == 4
    tokens = {"rollout": 0, "analysis": 0, "replay": 0}
    first = sorted({r.prompt_ids for requests, _ in seen.engine.calls[:2] for r in requests})
    assert len(first) == 4, "the lessons' prompts come first"
    for number, (requests, sampling) in enumerate(seen.engine.calls):
        kind = "rollout" if number < 6 else "analysis" if sampling.max_new_tokens == 600 else "replay"
        done = [seen.engine._complete(request, sampling) for request in requests]
        if number < 2 or number >= 6:
            tokens[kind] += sum(len(each.ids) for each in done)
    # The run replays once, without a control: an eighth of four attempts with and four without.
    lesson_tokens = tokens["analysis"] + round(tokens["replay"] / 8)
    assert lessons.token_share == pytest.approx(lesson_tokens / (lesson_tokens + tokens["rollout"]))
    assert lessons.uplift is not None and lessons.uplift.value == 0, "a scripted policy ignores lessons"
    assert lessons.solved == lessons.resampled
    assert NO_HELP in " ".join(result.advice) and result.choice is None


def test_rates_of_groups() -> None:
    verdicts = [(RIGHT, WRONG, ABSTAIN), (WRONG, WRONG), (RIGHT, RIGHT), (ABSTAIN, ABSTAIN)]
    groups = [Group("q", "h", tuple(Rollout(i, (1,), "", v) for i, v in enumerate(each))) for each in verdicts]
    found = rates(groups)
    assert found == Attempts(0.5, 0.25, 0.25, 0.25) and found.unjudged_share == 0.25
    assert rates(groups[3:]).pass_rate is None


# ---- the command ----


def command(folder: Path, *flags: str, tasks: int = 14, **settings: Any) -> Any:
    """`mel-lite probe` of a tiny random model in this process."""
    save_tiny(folder / "base", "qwen3")
    rows = [{"prompt": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(tasks)] * 2
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "model.dtype": "float32", "data.max_prompt_tokens": 60, "train.max_completion_length": 8,
        "train.analysis_max_tokens": 16, "train.max_context_tokens": 480, "train.num_generations": 4,
        "train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 4,
        "train.verifier": "numeric", "train.verifier_deadline_s": 60,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }  # fmt: skip
    options = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    data = ("--model", str(folder / "base"), "--dataset", str(folder / "tasks.jsonl"), "--gpu", "cpu")
    run = ("--output-dir", str(folder / "run"), "--prompts", "12")
    with warm_verifiers():
        return CliRunner().invoke(app, ["probe", *data, *options, *run, *flags])


@pytest.mark.slow
def test_a_random_model_is_told_that_lessons_will_not_help(tmp_path: Path) -> None:
    done = command(tmp_path, train__algorithm="grpo", train__replay_criterion="scored")
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert NO_HELP in shown
    assert "algorithm='grpo' is not followed" in shown and "generates no replays in training" in shown
    written = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert written["prompts"] == 12 and written["choice"] is None and len(written["notes"]) == 2
    assert written["attempts"]["pass_rate"] == 0 and written["dataset"].endswith("tasks.jsonl")
    assert not (tmp_path / "run" / "config.yaml").exists(), "it is no run to resume or export"


def test_json_alone_is_printed(tmp_path: Path) -> None:
    done = command(tmp_path, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "run" / "probe.json").read_text())


def test_a_small_dataset_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "build_trainer", lambda *_: pytest.fail("a model was loaded"))
    done = command(tmp_path, "--prompts", "24", tasks=14)
    assert isinstance(done.exception, DataError) and "has 14 different prompts" in str(done.exception)
    assert "--prompts 24 needs 24" in str(done.exception) and "Pass --prompts 14" in str(done.exception)
    done = command(tmp_path, tasks=5)
    assert isinstance(done.exception, DataError) and "Add rows (12 at least)" in str(done.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__verifier": "none.such:fn"}, "none.such"),
        ({"train__internalisation": "distil"}, "Did you mean 'distill'"),
        ({"train__internalisation": "replay", "train__replay_criterion": "scored"}, "scored+solved"),
    ],
)
def test_what_training_would_refuse_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    done = command(tmp_path, **settings)
    assert done.exit_code != 0 and message in str(done.exception)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mel_lite.engines.distributed.world", lambda: 2)
    with pytest.raises(ConfigError, match="one process"):
        probe(resolve(preset="cpu"), tmp_path / "run", console=None)


@pytest.mark.parametrize(
    ("per_device", "accumulation", "prompts", "groups", "rows"),
    [(16, 2, 36, 4, 8), (16, 16, 36, 6, 8), (4, 8, 12, 2, 4), (12, 2, 36, 3, 4), (1, 32, 36, 4, 1)],
)
def test_batches_are_no_larger_than_the_runs(
    per_device: int, accumulation: int, prompts: int, groups: int, rows: int
) -> None:
    train = {
        "num_generations": 8, "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation,
        "num_iterations": 3, "mel_weight": 0.1, "beta": 0.1,
    }  # fmt: skip
    args = MELConfig(output_dir="unused", use_cpu=True, bf16=False, **train)
    changed = MELConfig(output_dir="unused", use_cpu=True, bf16=False, **probe_options(train, args, prompts))
    assert changed.per_device_train_batch_size == rows <= per_device
    assert changed.generation_batch_size == 8 * groups and changed.steps_per_generation == 8 * groups // rows
    assert (changed.num_iterations, changed.mel_weight, changed.beta) == (1, 1.0, 0.0)
