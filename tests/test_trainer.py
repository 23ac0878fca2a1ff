"""MELTrainer: the loss of TRL is unchanged, the MEL term is added to it, and cutting up a batch changes nothing."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from batches import LOSS_TYPES, micro_batch, with_lessons
from mel_lite import MELConfig, MELTrainer
from mel_lite.lessons.internalise import LessonShare
from mel_lite.models.load import ModelSpec, load_base
from mel_lite.report.rollouts import RolloutLog
from mel_lite.training.scoring import install_scoring_head
from mel_lite.types import Lesson
from scripted import ANALYSIS, ScriptedEngine
from tiny_models import save_tiny, set_lora, tiny_tokenizer
from trainers import assert_learned, build, digest, judged_rollouts, sums, tiny_model, trainable


def _naive_logps(model: Any, ids: torch.Tensor, mask: torch.Tensor, keep: int, temperature: float) -> torch.Tensor:
    """Float64 log-softmax over the whole logits, row by row and without padding."""
    out = torch.zeros(len(ids), keep, dtype=torch.float64)
    for b in range(len(ids)):
        row = ids[b][mask[b].bool()]
        logp = torch.log_softmax(model(row[None]).logits[0].double() / temperature, dim=-1)
        scored = int(mask[b, -keep:].sum())
        picked = logp[:-1].gather(1, row[1:, None])[:, 0]
        out = out.index_put((torch.tensor(b), torch.arange(scored)), picked[len(picked) - scored :])
    return out


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_meta_experience_the_loss_is_trls(tmp_path: Path, loss_type: str) -> None:
    trainer = build(tmp_path, algorithm="grpo", loss_type=loss_type, beta=0.04, temperature=0.8)
    set_lora(trainer.model, 0.2)
    trainer.current_gradient_accumulation_steps = 1
    inputs = micro_batch()

    ours = trainer._compute_loss(trainer.model, inputs)
    ours.backward()
    our_grads = {n: p.grad.double() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()

    def naive(model: Any, ids: Any, mask: Any, keep: int, **_: Any) -> Any:
        logps = _naive_logps(model, ids, mask, keep, 0.8)
        return logps, torch.ones_like(logps), None

    trainer._get_per_token_logps_and_entropies = naive
    theirs = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    theirs.backward()

    assert abs(theirs.item()) > 1e-3
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    assert our_grads
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            error = (our_grads[name] - parameter.grad.double()).norm()
            assert error <= 3e-4 * parameter.grad.norm() + 1e-9, name


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_mel_term_is_the_mean_token_averaged_nll(tmp_path: Path, temperature: float) -> None:
    """Of the policy itself: the temperature rollouts are sampled at is no part of it."""
    trainer = build(tmp_path, mel_weight=0.5, temperature=temperature)
    set_lora(trainer.model, 0.2)
    trainer.current_gradient_accumulation_steps = 1
    inputs = micro_batch()
    lessons = (
        Lesson(1, tuple(range(10, 90)), tuple(range(100, 130))),
        Lesson(2, tuple(range(20, 50)), tuple(range(200, 207))),
    )
    policy = trainer._compute_loss(trainer.model, inputs).item()
    both = trainer._compute_loss(trainer.model, with_lessons(inputs, lessons, weight=0.5 / 2)).item()

    nlls = []
    for lesson in lessons:
        ids = torch.tensor([lesson.context_ids + lesson.target_ids])
        logps = _naive_logps(trainer.model, ids, torch.ones_like(ids), len(lesson.target_ids), 1.0)
        nlls.append(-logps.mean().item())
    assert both - policy == pytest.approx(0.5 * sum(nlls) / 2, rel=1e-4)


def spy_shares(trainer: Any) -> list[LessonShare]:
    """The lessons of every micro-batch, filled in while the trainer trains."""
    original, seen = trainer._compute_loss, []

    def spy(model: Any, inputs: Any) -> Any:
        seen.append(inputs["lessons"])
        return original(model, inputs)

    trainer._compute_loss = spy
    return seen


def test_few_survivors_weigh_little_when_normalized_by_prompts(tmp_path: Path) -> None:
    weights = {}
    for normalization in ("kept", "prompts"):
        trainer = build(tmp_path, mel_normalization=normalization, output_dir=tmp_path / normalization)
        shares = spy_shares(trainer)
        trainer.train()
        assert_learned(trainer)
        weights[normalization] = [(len(share.lessons), share.weight) for share in shares if share.lessons]
    assert weights["kept"] == [(n, 1 / n) for n, _ in weights["kept"]] and weights["kept"]
    assert weights["prompts"] == [(n, 1 / 2) for n, _ in weights["kept"]]


def test_a_run_goes_through_every_stage_and_learns(tmp_path: Path) -> None:
    trainer = build(tmp_path, grad_norm_every=1, replay_control=True, max_steps=3)
    before = trainable(trainer)
    trainer.train()
    assert_learned(trainer)
    assert digest(before) != digest(trainable(trainer))

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    totals = {name: sum(line.get(name) or 0 for line in steps) for name in steps[0]}
    funnel = [totals[f"mel/{s}"] for s in ("groups", "mixed_groups", "pairs", "parsed", "leak_free", "replay_valid")]
    assert funnel[0] == 6 and funnel == sorted(funnel, reverse=True) and funnel[-1] > 0
    assert totals["mel/trained_tokens"] > 50
    learned = [line for line in steps if "mel/nll" in line]
    assert learned, "no step trained on a lesson"
    for line in learned:
        assert line["mel/nll_after"] < line["mel/nll"], "one update on a lesson makes it more likely"
        assert line["mel/grad_norm_nll"] > 0 and -1 <= line["mel/grad_cosine"] <= 1
    rows = trainer.store.list(limit=100)
    assert len(rows) == totals["mel/written"]
    assert [row.step for row in rows] == [line["step"] for line in steps for _ in range(int(line["mel/written"]))]
    assert trainer.store.list(step=2) == [row for row in rows if row.step == 2]
    assert trainer.store.export(tmp_path / "all.jsonl") == len(rows)
    exported = [json.loads(line)["step"] for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert exported == [row.step for row in rows]
    kept = [row for row in rows if row.status == "kept"]
    assert len(kept) == totals["mel/replay_valid"]
    assert all(row.nll_after < row.nll_before and row.trained_tokens > 0 for row in kept)
    assert all(row.uplift is not None for row in kept)


def test_the_quoted_step_is_located_counted_and_stored(tmp_path: Path) -> None:
    analysis = ANALYSIS.replace("parts", "writes `{}` and parts", 1)
    engine = ScriptedEngine(tiny_tokenizer(), analysis=lambda rng: analysis.format(rng.choice(("answer :", "nothing"))))
    trainer = build(tmp_path, engine=engine, max_steps=3)
    trainer.train()
    assert_learned(trainer)
    rows = trainer.store.list()
    quoted = [row.quoted_step for row in rows if row.quote_start is not None]
    parsed = sum(row.status != "unparsed" for row in rows)
    assert set(quoted) == {"Answer:"} and 0 < len(quoted) < parsed
    assert trainer.funnel_totals["mel/quoted"] == len(quoted)


def test_gradient_norms_are_those_of_the_two_terms(tmp_path: Path) -> None:
    trainer = build(tmp_path, grad_norm_every=1)
    set_lora(trainer.model, 0.2)
    trainer.current_gradient_accumulation_steps = 1
    lesson = Lesson(1, tuple(range(10, 40)), tuple(range(100, 120)))
    inputs = with_lessons(micro_batch(), (lesson,), weight=1.0)
    norms = {}
    for term, batch in (("policy", micro_batch()), ("both", inputs)):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, batch).backward()
        norms[term] = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.gradient_meter._grads.clear()
    trainer._compute_loss(trainer.model, inputs)
    measured = trainer.gradient_meter.drain(lambda t: t)
    nll = norms["both"] - norms["policy"]
    assert measured["mel/grad_norm_policy"] == pytest.approx(norms["policy"].norm().item(), rel=1e-4)
    assert measured["mel/grad_norm_nll"] == pytest.approx(nll.norm().item(), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(nll, norms["policy"], dim=0).item()
    assert measured["mel/grad_cosine"] == pytest.approx(cosine, abs=1e-4)


def test_every_rank_reduces_both_terms(tmp_path: Path) -> None:
    """A rank without a lesson must not skip a collective that the others enter."""
    trainer = build(tmp_path, grad_norm_every=1)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, micro_batch())
    reduced: list[torch.Tensor] = []
    metrics = trainer.gradient_meter.drain(lambda t: reduced.append(t) or t)
    assert len(reduced) == 2 and reduced[0].norm() > 0 and reduced[1].norm() == 0
    assert set(metrics) == {"mel/grad_norm_policy"}


def _one_step(tmp_path: Path, name: str, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    trainer = build(tmp_path, output_dir=tmp_path / name, max_steps=1, optim="sgd", max_grad_norm=0.0, **options)
    trainer.train()
    assert_learned(trainer)
    line = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
    assert line["mel/replay_valid"] > 0
    return trainable(trainer), line


@pytest.mark.slow
def test_one_batch_of_16_equals_four_accumulated_ones(tmp_path: Path) -> None:
    whole, line = _one_step(tmp_path, "whole", per_device_train_batch_size=16)
    for micro in (4, 1):
        cut, cut_line = _one_step(
            tmp_path, f"cut{micro}", per_device_train_batch_size=micro, gradient_accumulation_steps=16 // micro
        )
        assert cut_line["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4) and line["grad_norm"] > 1e-3
        assert cut_line["mel/nll"] == pytest.approx(line["mel/nll"], rel=1e-5)
        for key, value in whole.items():
            torch.testing.assert_close(cut[key], value, rtol=1e-4, atol=1e-6)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    tight, line = _one_step(tmp_path, "tight")
    padded, padded_line = _one_step(tmp_path, "padded", pad_to_multiple_of=64)
    assert padded_line["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
    for key, value in tight.items():
        torch.testing.assert_close(padded[key], value, rtol=1e-5, atol=1e-7)


def test_old_and_new_log_probs_come_from_the_same_code(tmp_path: Path) -> None:
    """Equal blocks give equal bits, so an on-policy ratio is exactly 1; other blocks differ by rounding alone."""
    trainer = build(tmp_path)
    set_lora(trainer.model, 0.2)
    batch = micro_batch()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    new, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 6)
    with torch.no_grad():
        old, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 6)
        by_one, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 6, batch_size=1)
    assert new.requires_grad and torch.equal(new.detach(), old) and old.abs().sum() > 50
    torch.testing.assert_close(by_one, old, rtol=1e-5, atol=1e-5)
    assert not (old * ~batch["completion_mask"].bool()).any()


def test_several_iterations_on_one_batch_train_its_lessons_again(tmp_path: Path) -> None:
    trainer = build(tmp_path, num_iterations=2, max_steps=2)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "mel/groups" in lines[0] and "mel/groups" not in lines[1], "one generation batch, two updates"
    assert lines[1]["mel/nll"] == pytest.approx(lines[0]["mel/nll_after"], rel=1e-4)
    assert_learned(trainer)


def test_an_unchanged_trl_script_runs_with_the_names_swapped(tmp_path: Path) -> None:
    """No verifier, no answer column: a reward function is the only judge, in rollouts and in replays."""
    seen: list[int] = []

    def right_sum(prompts: Any, completions: Any, level: Any, trainer_state: Any, **kwargs: Any) -> list[float]:
        seen.append(len(prompts))
        assert len(level) == len(prompts)
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            a, b = (int(w) for w in prompt[-1]["content"].rstrip("?").split() if w.isdigit())
            rewards.append(1.0 if completion[0]["content"].strip() == f"Answer: {a + b}" else 0.0)
        return rewards

    dataset = sums().remove_columns("answer")
    trainer = build(tmp_path, reward_funcs=right_sum, train_dataset=dataset, verifier=None)
    trainer.train()
    assert_learned(trainer)
    assert any(row.status == "kept" for row in trainer.store.list(limit=50))
    assert any(n not in (4, 8) for n in seen), "replays are judged by the reward function too"


def test_constructor_takes_trls_arguments_in_trls_order() -> None:
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    ours = list(inspect.signature(MELTrainer.__init__).parameters)
    assert ours[: len(theirs)] == theirs
    assert issubclass(MELTrainer, GRPOTrainer) and issubclass(MELConfig, GRPOConfig)


def test_full_fine_tuning_trains_the_head_too(tmp_path: Path) -> None:
    trainer = build(tmp_path, lora=False, max_steps=1)
    before = trainable(trainer)
    trainer.train()
    after = trainable(trainer)
    head = "lm_head.weight" if "lm_head.weight" in after else "model.embed_tokens.weight"
    assert not torch.equal(before[head], after[head])


def test_qlora_trains_on_a_4_bit_base(tmp_path: Path) -> None:
    """The quantized base stays as it was; every adapter below the first layer gets a gradient, also after sampling."""
    save_tiny(tmp_path / "base")
    model = load_base(ModelSpec(str(tmp_path / "base"), dtype="float32", load_in_4bit=True))
    trainer = build(tmp_path, model=model, max_steps=1)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    assert any(p.dtype is torch.uint8 for p in frozen.values()), "the base is not quantized"
    trainer.train()
    assert_learned(trainer)
    for name, parameter in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
        elif "lora_B" in name:
            assert parameter.abs().sum() > 0, f"{name} had no gradient"


def test_the_entropy_bonus_has_a_gradient(tmp_path: Path) -> None:
    grads = []
    for coefficient in (0.0, 0.5):
        trainer = build(tmp_path, algorithm="grpo", entropy_coef=coefficient, output_dir=tmp_path / str(coefficient))
        set_lora(trainer.model, 0.2)
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, micro_batch()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    assert (grads[1] - grads[0]).norm() > 1e-3 * grads[0].norm()


def test_abstention_gives_no_reward_and_no_gradient(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{**row, "answer": "not a number"} for row in sums()])
    trainer = build(tmp_path, train_dataset=dataset, max_steps=1)
    trainer.train()
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["mel/abstain_rate"] == 1.0 and line["reward"] is None and line["grad_norm"] == 0.0


def test_a_missing_answer_is_an_abstention_not_the_word_none(tmp_path: Path) -> None:
    dataset = Dataset.from_list([{**row, "answer": None if i else "3"} for i, row in enumerate(sums())])
    engine = ScriptedEngine(tiny_tokenizer(), answer=lambda question, rng: "None")
    trainer = build(tmp_path, train_dataset=dataset, verifier="exact", engine=engine, max_steps=1)
    rollouts = judged_rollouts(trainer)
    trainer.train()
    assert {rollout.verdict for group, rollout in rollouts if group.answer is None} == {"abstain"}


def test_a_prompt_that_comes_twice_in_a_step_is_sampled_again(tmp_path: Path) -> None:
    """Two generation batches within one optimizer step, with the same prompts in the same rows."""
    engine = ScriptedEngine(tiny_tokenizer())
    options = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 1, "algorithm": "grpo"}
    twice = Dataset.from_list([*sums(2), *sums(2)])
    build(tmp_path, engine=engine, train_dataset=twice, shuffle_dataset=False, **options).train()
    first, second = ({r.seed for r in requests} for requests, _ in engine.calls)
    assert len(first) == len(second) == 8 and not first & second


def test_rewards_of_replays_do_not_log_into_the_completions_table(tmp_path: Path) -> None:
    def right_sum(prompts: Any, completions: Any, log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("length", [len(c[0]["content"]) for c in completions])
        texts = [(p[-1]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]
        numbers = [[int(w) for w in q.rstrip("?").split() if w.isdigit()] for q, _ in texts]
        return [float(a == f"Answer: {sum(n)}") for (_, a), n in zip(texts, numbers, strict=True)]

    options = {"log_completions": True, "num_completions_to_print": 0, "verifier": None, "max_steps": 3}
    build(tmp_path, reward_funcs=right_sum, train_dataset=sums().remove_columns("answer"), **options).train()
    rows = RolloutLog(tmp_path / "run").find()
    assert [row.id for row in rows] == [f"{step}.{i}" for step in (1, 2, 3) for i in range(len(rows) // 3)]
    for row in rows:
        right = row.text == f"Answer: {sum(int(word) for word in row.question.rstrip('?').split() if word.isdigit())}"
        assert (row.verdict, row.reward) == (("right", 1.0) if right else ("wrong", 0.0))
        assert row.columns == {"right_sum": row.reward, "length": len(row.text)} and row.advantage is not None
    assert {row.verdict for row in rows} == {"right", "wrong"}


def test_the_scoring_head_leaves_other_calls_alone(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "base")
    ids = torch.arange(10, 30)[None]
    before = model(ids).logits
    install_scoring_head(model)
    assert torch.equal(model(ids).logits, before)
    assert "input_ids" in inspect.signature(model.forward).parameters


def test_a_dataset_without_mixed_groups_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine(tokenizer, answer=lambda question, rng: "Answer: 999")
    trainer = build(tmp_path, engine=engine, max_steps=5)
    trainer.train()
    assert trainer.collapse.idle.idle_batches == 5
    assert "too hard, or answers are not found" in caplog.text and "0% right" in caplog.text


def test_the_end_of_a_trl_script_works(tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=1)
    metrics = trainer.train().metrics
    assert_learned(trainer)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    saved = json.loads((tmp_path / "run" / "train_results.json").read_text())
    assert saved["train_loss"] == metrics["train_loss"]
