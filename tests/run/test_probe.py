"""`mel-lite probe`: gradients are training's, weights stay, figures are checked by hand, and the advice follows."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from experiences import experience, lesson_context
from mel_lite import MELConfig
from mel_lite.cli.main import app
from mel_lite.errors import ConfigError, DataError
from mel_lite.lessons.internalise import DrawnBatch, RolloutBatch, get_internalisation
from mel_lite.recipe import resolve
from mel_lite.report.statistics import Estimate
from mel_lite.run import probe as probe_module
from mel_lite.run.probe import probe, probe_options
from mel_lite.run.probe_advice import NO_HELP, advise
from mel_lite.run.probe_gradients import GradientProbe, ProbeBatch
from mel_lite.run.probe_lessons import settled, shift_from_fork
from mel_lite.run.probe_measure import measure, rates
from mel_lite.run.probe_result import Attempts, Lessons, ProbeResult, WayGradient
from mel_lite.types import Group, LessonShare, Replay, Rollout, Status, Verdict
from scripted import ScriptedEngine
from tiny_models import save_tiny, set_lora, tiny_tokenizer
from trainers import build, digest, sums

RIGHT, WRONG, ABSTAIN = Verdict.RIGHT, Verdict.WRONG, Verdict.ABSTAIN
TRAIN = {"num_generations": 4, "per_device_train_batch_size": 8, "verifier_deadline_s": 60.0}


def built(folder: Path, **options: Any) -> Any:
    """A trainer as the probe builds it: 6 batches of 2 prompts x 4 completions, with a scripted policy."""
    args = MELConfig(output_dir=str(folder / "unused"), use_cpu=True, bf16=False, **TRAIN)
    changed = probe_options(TRAIN, args, 12)
    trainer = build(folder, train_dataset=sums(12), engine=ScriptedEngine(tiny_tokenizer()), **changed | options)
    set_lora(trainer.model, 0.2)
    return trainer


def all_weights(trainer: Any) -> str:
    return digest({name: weight.detach() for name, weight in trainer.model.named_parameters()})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ProbeResult, Any]:
    """A measurement, and what was seen: weights before and after, the rows of each micro-batch, and the engine."""
    trainer = built(tmp_path_factory.mktemp("probe"))
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


def test_the_same_seed_gives_the_same_figures(measured: tuple[ProbeResult, Any], tmp_path: Path) -> None:
    result, _ = measured
    again = measure(built(tmp_path), attempts=4)
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


# ---- gradients ----


def flat_gradient(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The gradient of the trainer's loss on a whole generation batch as one micro-batch."""
    trainer.args.steps_per_generation, steps = 1, trainer.args.steps_per_generation
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    trainer.model.train()
    trainer._compute_loss(trainer.model, inputs).backward()
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = steps
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])


def test_gradients_are_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For NLL, a divergence and new advantages: with the way minus without, on the whole batch at once."""
    trainer = built(tmp_path)
    compared: dict[str, torch.Tensor] = {}

    def ways(self: Any, gradients: GradientProbe, batches: list[ProbeBatch], drawn: list[Any]) -> list[WayGradient]:
        batch = next(i for i, each in enumerate(drawn) if any(e.status is Status.KEPT for _, e in each.experiences))
        rollouts, context = batches[batch], trainer.lesson_context
        plain = flat_gradient(trainer, {**rollouts.entries})
        compared["policy"] = torch.stack([sum(gradients.policy(rollouts)), plain])
        for name, options in (("analysis", {}), ("distill", {"context": "own"}), ("credit", {"context": "own"})):
            way = get_internalisation(name, options)
            taken = DrawnBatch(drawn[batch].experiences, rollouts.groups, context, drawn[batch].pairs)
            one_by_one = sum(gradients.of_way(way, taken, rollouts))
            trainer.internalisation = way
            lessons = way.lessons(taken)
            added = way.batch_entries(taken, RolloutBatch(rollouts.rows, rollouts.entries), trainer.scorer)
            share = LessonShare(tuple(lessons), 1.0 / max(1, len(lessons)))
            whole = flat_gradient(trainer, {**rollouts.entries, **added, "lessons": share})
            compared[name] = torch.stack([one_by_one, whole - plain])
        return [WayGradient("policy loss", None)]

    monkeypatch.setattr("mel_lite.run.probe_measure._Measurement._ways", ways)
    measure(trainer, attempts=4)
    for name, (one_by_one, whole) in compared.items():
        assert whole.norm() > 1e-3, name
        assert (one_by_one - whole).norm() <= 1e-4 * whole.norm(), name
    assert len(compared) == 4


def fake_probe(reference: list[float]) -> GradientProbe:
    model = torch.nn.Linear(len(reference), 1)
    probe = GradientProbe(SimpleNamespace(model=model, args=SimpleNamespace(seed=3)))
    probe.reference_D = torch.tensor(reference)
    return probe


def test_cosines_and_norms_are_those_of_the_sums() -> None:
    grads = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + 0.5
    reference = [1.0, 0.5, -0.2, 0.0, 2.0]
    found = fake_probe(reference).measure(WayGradient("x", "x"), [iter(grads[:4]), iter(grads[4:])])
    expected = torch.nn.functional.cosine_similarity(grads.sum(0), torch.tensor(reference), dim=0).item()
    assert found.cosine is not None and found.cosine.value == pytest.approx(expected, abs=1e-6)
    assert found.cosine.low < found.cosine.value < found.cosine.high
    assert found.norm == pytest.approx((grads[:4].sum(0).norm() + grads[4:].sum(0).norm()).item() / 2)
    assert found.prompts == 6


def test_equal_gradients_keep_an_interval_and_none_has_no_cosine() -> None:
    same = [torch.tensor([1.0, 1.0])] * 4
    found = fake_probe([1.0, 0.0]).measure(WayGradient("x", "x"), [iter(same)])
    assert found.cosine is not None
    missed = 1 - 0.025 ** (1 / 4)
    assert [found.cosine.low, found.cosine.high] == pytest.approx([0.5**0.5 - missed, 1.0])
    nothing = fake_probe([1.0, 0.0]).measure(WayGradient("x", "x"), [iter([torch.zeros(2)] * 4)])
    assert nothing.cosine is None and nothing.norm == 0 and nothing.prompts == 0


def test_one_prompt_among_many_does_not_prove_a_direction() -> None:
    grads = [torch.zeros(2)] * 5 + [torch.tensor([1.0, 0.0])]
    found = fake_probe([1.0, 0.0]).measure(WayGradient("x", "x"), [iter(grads)])
    assert found.cosine is not None and found.cosine.value == 1.0 and found.cosine.low == 0.0


# ---- lessons ----


def test_the_share_of_a_shift_from_the_fork_on() -> None:
    """Two wrong rollouts that leave the right one after 2 tokens: |shift| 1 + 1 + 3 + 1 and 0 + 1 + 2."""
    right = Rollout(0, (5, 6, 7, 2), "a", RIGHT)
    wrong = (Rollout(1, (5, 6, 8, 2), "b", WRONG), Rollout(2, (5, 6, 9), "c", WRONG))
    group = Group("q", "h", (right, *wrong), answer="1")
    lesson = experience()
    lesson = replace(lesson, analysis=replace(lesson.analysis, pair=replace(lesson.analysis.pair, group=group)))
    with_lesson = [[-1.0, 1.0, -3.0, -1.0], [0.0, -1.0, 2.0]]

    def logps(texts: Any) -> list[torch.Tensor]:
        rows = [*with_lesson, [0.0] * 4, [0.0] * 3]
        assert [text.target_ids for text in texts] == [rollout.completion_ids for rollout in wrong] * 2
        assert len(texts[0].context_ids) > len(texts[2].context_ids), "the lesson is in the first prompts"
        return [torch.tensor(row) for row in rows]

    context = lesson_context(tiny_tokenizer(), scorer=SimpleNamespace(logps=logps))
    assert shift_from_fork([lesson], context) == pytest.approx((6 / 9, 3 / 7))
    assert shift_from_fork([], context) is None


@pytest.mark.parametrize(
    ("criterion", "shift", "solved", "control", "status"),
    [
        ("solved", -1.0, 2, 2, Status.KEPT),
        ("solved", 1.0, 1, 0, Status.REPLAY_FAILED),
        ("uplift", -1.0, 1, 0, Status.KEPT),
        ("uplift", 1.0, 2, 2, Status.REPLAY_FAILED),
        ("scored", 1.0, 0, 2, Status.KEPT),
        ("scored", 0.0, 2, 0, Status.NOT_LIFTING),
        ("scored", None, 2, 0, Status.NOT_LIFTING),
        ("scored+solved", 1.0, 1, 0, Status.REPLAY_FAILED),
        ("scored+uplift", 1.0, 1, 0, Status.KEPT),
    ],
)
def test_the_runs_own_criterion_keeps(
    criterion: str, shift: float | None, solved: int, control: int, status: Status
) -> None:
    verdicts = (RIGHT,) * solved + (WRONG,) * (2 - solved)
    without = (RIGHT,) * control + (WRONG,) * (2 - control)
    proved = settled(replace(experience(), replay=Replay(verdicts, ("", ""), without)), shift, criterion)
    assert proved.status is status and proved.shift_nats == shift and bool(proved.reason) == (status != "kept")


def test_rates_of_groups() -> None:
    verdicts = [(RIGHT, WRONG, ABSTAIN), (WRONG, WRONG), (RIGHT, RIGHT), (ABSTAIN, ABSTAIN)]
    groups = [Group("q", "h", tuple(Rollout(i, (1,), "", v) for i, v in enumerate(each))) for each in verdicts]
    found = rates(groups)
    assert found == Attempts(0.5, 0.25, 0.25, 0.25) and found.unjudged_share == 0.25
    assert rates(groups[3:]).pass_rate is None


# ---- advice ----

GOOD_LESSONS = Lessons(
    written=20, cut_off=0, parsed=20, quoted=18, leaked=1, kept=15, replayed=19, solved=0.6, resampled=0.4,
    uplift=Estimate(0.2, 0.1, 0.3), shift_nats=Estimate(2.0, 1.0, 3.0), shift_from_fork=0.8, tokens_from_fork=0.5,
    token_share=0.2,
)  # fmt: skip
POLICY = WayGradient("policy loss", None, {}, Estimate(0.58, 0.4, 0.7), 0.2, None, 12)
ANALYSIS = WayGradient("analysis", "analysis", {}, Estimate(0.03, -0.02, 0.06), 0.2, 1.0, 12)
OWN = WayGradient("distill own lesson", "distill", {"context": "own"}, Estimate(0.4, 0.2, 0.5), 0.4, 2.0, 12, 1.5)
SIBLING = WayGradient(
    "distill right sibling", "distill", {"context": "sibling"}, Estimate(0.3, 0.1, 0.5), 0.1, 0.5, 12, 2.0
)
RESULT = ProbeResult(
    model="m", dataset="d", seed=1, prompts=36, lesson_prompts=12, group_size=8, replay_attempts=4, mel_weight=1.0,
    attempts=Attempts(0.4, 0.8, 0.1, 0.1), lessons=GOOD_LESSONS, halves=Estimate(0.6, 0.4, 0.8),
    ways=(POLICY, ANALYSIS, OWN, SIBLING),
)  # fmt: skip


def but(way: WayGradient, **changes: Any) -> ProbeResult:
    """RESULT with one way changed."""
    return replace(RESULT, ways=tuple(replace(each, **changes) if each is way else each for each in RESULT.ways))


def lessons(**changes: Any) -> ProbeResult:
    return replace(RESULT, lessons=replace(GOOD_LESSONS, **changes))


CASES: dict[str, tuple[ProbeResult, str | None, list[str]]] = {
    "the highest cosine": (
        RESULT,
        "distill own lesson",
        [
            "Lessons lift replays over plain resampling (+20.0 [+10.0, +30.0] points)",
            "analysis only adds noise: its cosine with the policy gradient is +0.03 [-0.02, +0.06]",
            "--set train.internalisation=distill",
            "train.internalisation_options={context: own}",
            "--set train.mel_weight=0.5",
            "its gradient would be 2.0 times the policy's",
            "of at most 0.87",
        ],
    ),
    "at a lower lambda": (replace(RESULT, mel_weight=0.3), "distill own lesson", ["Choose: distill own lesson"]),
    "no uplift leaves the sibling": (
        lessons(uplift=Estimate(0.0, -0.1, 0.1)),
        "distill right sibling",
        [
            NO_HELP,
            "do not lift replays over plain resampling (+0.0 [-10.0, +10.0] points",
            "train.mark_fork",
            "{context: sibling}",
        ],
    ),
    "an uplift that is not sure": (
        lessons(uplift=Estimate(0.1, -0.1, 0.3)),
        "distill own lesson",
        ["may lift replays", "Raise --prompts"],
    ),
    "a bad teacher": (
        but(OWN, teacher_shift_nats=-0.5),
        "distill right sibling",
        ["Do not choose distill own lesson: its teacher is no better than the student (-0.50 nats"],
    ),
    "a teacher that is equal": (but(OWN, teacher_shift_nats=0.0), "distill right sibling", ["no better"]),
    "one that pulls against": (
        but(OWN, cosine=Estimate(-0.3, -0.4, -0.1)),
        "distill right sibling",
        ["it pulls against the policy gradient"],
    ),
    "nothing points its way": (
        replace(RESULT, ways=(POLICY, ANALYSIS)),
        None,
        ["Choose: --algorithm grpo", "analysis only adds noise"],
    ),
    "no gradient": (but(OWN, cosine=None), "distill right sibling", ["distill own lesson: no gradient"]),
    "halves that do not agree": (
        replace(RESULT, halves=Estimate(0.1, -0.2, 0.3)),
        None,
        ["two halves", "Raise --prompts", "--algorithm grpo"],
    ),
    "no analyses with the parts": (
        lessons(parsed=9, cut_off=2),
        "distill right sibling",
        [NO_HELP, "9 of 20 analyses", "Warm the model up"],
    ),
    "analyses cut off": (lessons(parsed=9, cut_off=11), "distill right sibling", ["raise train.analysis_max_tokens"]),
    "leaks": (lessons(leaked=11), "distill own lesson", ["11 of 20", "train.leak_policy=redact"]),
    "all leak": (
        lessons(leaked=20, replayed=0, uplift=None, shift_nats=None),
        "distill right sibling",
        [NO_HELP, "none was left to replay"],
    ),
    "lessons that favor wrong rollouts": (
        lessons(shift_nats=Estimate(-1.0, -2.0, 0.5)),
        "distill own lesson",
        ["do not favor the right rollouts", "replay_criterion=scored+solved"],
    ),
    "no lesson": (lessons(written=0, parsed=0), "distill right sibling", [NO_HELP, "Raise --prompts"]),
    "too hard": (
        replace(RESULT, attempts=Attempts(0.04, 0.2, 0.8, 0.0)),
        "distill own lesson",
        ["4% is too low for GRPO: 20% of the groups", "num_generations"],
    ),
    "too easy": (replace(RESULT, attempts=Attempts(0.96, 0.2, 0.0, 0.8)), "distill own lesson", ["too high for GRPO"]),
    "all wrong": (
        replace(RESULT, attempts=Attempts(0.0, 0.0, 1.0, 0.0)),
        None,
        [NO_HELP, "too hard, or answers are not found", "easier tasks"],
    ),
    "all right": (
        replace(RESULT, attempts=Attempts(1.0, 0.0, 0.0, 1.0)),
        None,
        [NO_HELP, "too easy", "harder tasks"],
    ),
    "not judged": (
        replace(RESULT, attempts=Attempts(None, 0.0, 0.0, 0.0)),
        None,
        ["abstained on every completion", "--answer-column"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_advice_follows_from_the_figures(case: str) -> None:
    result, choice, words = CASES[case]
    chosen, reasons = advise(result)
    text = " ".join(reasons)
    assert chosen == choice, text
    for word in words:
        assert word in text, text
    if case == "at a lower lambda":
        assert "mel_weight" not in text, "0.3 x 2 is below the policy's"


def test_the_tables_show_the_figures() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    for table in RESULT.tables():
        console.print(table)
    shown = " ".join(console.export_text().split())
    for figure in (
        "80% / 10% / 10%",
        "18 (90%)",
        "+20.0 [+10.0, +30.0] points (solved 60%, without 40%)",
        "80% (50% of",
    ):
        assert figure in shown, shown
    assert "a perfect loss would show +0.87" in shown and "+0.03 [-0.02, +0.06]" in shown


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
        "train.verifier_deadline_s": 60,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }  # fmt: skip
    options = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    data = ("--model", str(folder / "base"), "--dataset", str(folder / "tasks.jsonl"), "--gpu", "cpu")
    run = ("--output-dir", str(folder / "run"), "--prompts", "12")
    return CliRunner().invoke(app, ["probe", *data, *options, *run, *flags])


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
