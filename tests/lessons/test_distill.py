"""Distillation of the policy with notes in its prompt, against full logits of the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise import RolloutBatch, ScoredMicroBatch, get_internalisation
from mel_lite.training.savings import Savings
from mel_lite.types import Verdict
from teaching import Rules, assert_close, catch, distinct, expected_rows, gradients, loss_gradients, note_of
from trainers import build

RIGHT, WRONG = Verdict.RIGHT, Verdict.WRONG

CASES: dict[str, dict[str, Any]] = {
    "a right sibling": {"context": "sibling"},
    "all tokens": {"context": "sibling", "sign": False},
    "wrong rows only": {"context": "sibling", "sign": False, "rows": "wrong"},
    "another question's sibling": {"context": "sibling", "shuffled": True, "sign": False},
    "own lessons in turns": {"context": "own", "sign": False},
    "own lessons at once": {"context": "own", "per_prompt": "all"},
    "rules of a bank": {"context": "bank"},
    "rules of a bank at once": {"context": "bank", "per_prompt": "all", "sign": False},
    "rules of another question": {"context": "bank", "shuffled": True},
    "a sibling, else the bank": {"context": "sibling+bank"},
    "from the fork on": {"context": "sibling", "sign": False, "mask": "fork"},
    "where notes matter": {"context": "sibling", "sign": False, "mask": "shift", "shift_nats": 1.0},
    "the policy of the start": {"context": "sibling", "reader": "frozen"},
    "the start, where notes matter": {
        "context": "bank", "per_prompt": "all", "reader": "frozen", "mask": "shift", "shift_nats": 1.0,
    },
    "no notes": {"context": "none", "reader": "frozen", "sign": False},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_full_logits(tmp_path: Path, case: str) -> None:
    """lambda / N sum over taught tokens of KL(pi || pi_T), N all completion tokens of the step."""
    options = CASES[case]
    bank = Rules() if "bank" in options["context"] else None
    caught = catch(tmp_path, bank=bank, internalisation="distill", internalisation_options=options)
    trainer = caught.trainer
    rows = expected_rows(caught, options)
    used = torch.cat([use_T for _, use_T, _ in rows.values()])
    chooses = options.get("sign", True) or "mask" in options or "rows" in options
    assert used.any() and bool(used.all()) is not chooses
    if "bank" in options["context"]:
        assert any(use_T.any() and not caught.rows[row][0].right for row, (_, use_T, _) in rows.items()), "all wrong"
    tokens = sum(len(rollout.completion_ids) for _, rollout in caught.rows)
    total = 0.3 / tokens * sum(kl_T[use_T].sum() for kl_T, use_T, _ in rows.values())
    expected = loss_gradients(trainer, total)
    loss = 0.0
    for inputs in distinct(caught.micro_batches):
        for row, mask_C in zip(inputs["row"].tolist(), inputs["teacher_mask"], strict=True):
            use_T = rows[row][1] if row in rows else torch.zeros(0, dtype=torch.bool)
            assert mask_C[: len(use_T)].tolist() == use_T.tolist() and not mask_C[len(use_T) :].any(), row
        without_policy = inputs | {"advantages": torch.zeros_like(inputs["advantages"])}
        part = trainer._compute_loss(trainer.model, without_policy)
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(total.item(), rel=1e-5) and total > 1e-3
    assert_close(gradients(trainer), expected)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("tokens", [None, 130, 250])
def test_its_gradient_does_not_depend_on_how_a_micro_batch_is_cut(
    tmp_path: Path, tokens: int | None, skip: bool
) -> None:
    """Rows of all-wrong groups have no advantage; those with a teacher go through the model, the others do not."""
    options = {"context": "bank", "per_prompt": "all"}
    caught = catch(tmp_path, bank=Rules(), internalisation="distill", internalisation_options=options)
    trainer = caught.trainer
    micro_batches = distinct(caught.micro_batches)
    for inputs in micro_batches:
        trainer._compute_loss(trainer.model, inputs).backward()
    expected = gradients(trainer)
    trainer.args.max_micro_batch_tokens, trainer.args.skip_zero_advantage = tokens, skip
    trainer.args.share_prompts = False
    trainer.savings = Savings(trainer)
    forwarded = []
    score = trainer._score

    def see(model: Any, rows: Any, *arguments: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            forwarded.append([tuple(row.ids.tolist()) for row in rows])
        return score(model, rows, *arguments, **named)

    trainer._score = see
    for inputs in micro_batches:
        trainer.compute_loss(trainer.model, inputs)
    assert_close(gradients(trainer), expected)
    assert len(forwarded) == len(micro_batches) if tokens is None else len(forwarded) > len(micro_batches)
    moved = [row for row in range(16) if caught.after["advantages"][row] or caught.after["teacher_mask"][row].any()]
    only_taught = [row for row in moved if not caught.after["advantages"][row]]
    assert only_taught and len(moved) < 16
    texts = [caught.prompt(row, None) + rollout.completion_ids for row, (_, rollout) in enumerate(caught.rows)]
    wanted = [texts[row] for row in moved] if skip else texts
    assert sorted(ids for part in forwarded for ids in part) == sorted(wanted)


@pytest.mark.parametrize("case", ["a right sibling", "from the fork on", "where notes matter", "rules of a bank"])
def test_the_sampled_form_adds_the_clipped_log_ratio_to_the_advantages(tmp_path: Path, case: str) -> None:
    options = CASES[case] | {"form": "sampled", "clip_nats": 1.5}
    bank = Rules() if "bank" in options["context"] else None
    caught = catch(tmp_path, bank=bank, internalisation="distill", internalisation_options=options)
    expected_BC = caught.before["advantages"][:, None].repeat(1, caught.before["completion_ids"].shape[1])
    plain_BC = expected_BC.clone()
    clipped = 0
    for row, (_, use_T, gain_T) in expected_rows(caught, options).items():
        bounded_T = gain_T.clamp(-1.5, 1.5)
        clipped += int((bounded_T != gain_T)[use_T].sum())
        expected_BC[row, : len(gain_T)] += 0.3 * torch.where(use_T, bounded_T, 0.0).float()
    assert torch.allclose(caught.after["advantages"], expected_BC, atol=1e-4)
    assert clipped and (expected_BC - plain_BC).abs().max() == pytest.approx(0.45)
    assert "teacher_mask" not in caught.after and caught.trainer.internalisation.loss(scored_with_divergence()) is None


def scored_with_divergence() -> Any:
    """A micro-batch in which another way of a combination has a teacher."""
    ones = torch.ones(1, 2)
    return ScoredMicroBatch({}, ones, (), (), 1.0, lesson_weight=1.0, token_weight=1.0, kl_BC=ones)


def test_a_teacher_prompt_over_the_context_is_skipped_and_counted(tmp_path: Path) -> None:
    def shorten(trainer: Any) -> None:
        trainer.lesson_context = replace(trainer.lesson_context, context_tokens=LIMIT)

    caught = catch(
        tmp_path, bank=Rules(), change=shorten, internalisation="distill",
        internalisation_options={"context": "sibling+bank", "per_prompt": "all", "sign": False},
    )  # fmt: skip
    notes = [note_of(caught, row, context="sibling+bank", per_prompt="all") for row in range(16)]
    lengths = [
        None if note is None else len(caught.prompt(row, note)) + len(caught.rows[row][1].completion_ids)
        for row, note in enumerate(notes)
    ]
    fits = [length is not None and length <= LIMIT for length in lengths]
    assert caught.after["teacher_mask"].any(dim=1).tolist() == fits
    logged = {name: values[-1] for name, values in caught.logged.items()}
    over = sum(length is not None and length > LIMIT for length in lengths)
    assert logged["mel/over_context"] == over > 0 and logged["mel/taught_rows"] == sum(fits) > 0
    assert logged["mel/without_notes"] == notes.count(None) > 0


LIMIT = 290
"""Tokens that hold a sibling's prompt, but not one with two rules."""


def test_metrics_say_what_was_taught(tmp_path: Path) -> None:
    caught = catch(tmp_path, internalisation="distill", internalisation_options={"context": "sibling"})
    rows = expected_rows(caught, {"context": "sibling"})
    used = torch.cat([use_T for _, use_T, _ in rows.values()])
    totals = {verdict: [] for verdict in (RIGHT, WRONG)}  # type: dict[Verdict, list[float]]
    for row, (_, _, gain_T) in rows.items():
        totals[caught.rows[row][1].verdict].append(float(gain_T.sum()))
    right, wrong = totals[RIGHT], totals[WRONG]
    assert {name: values[-1] for name, values in caught.logged.items() if name in METRICS} == pytest.approx(
        {
            "mel/taught_rows": len(rows),
            "mel/without_notes": 16 - len(rows),
            "mel/over_context": 0,
            "mel/taught_tokens": used.float().mean().item(),
            "mel/teacher_shift": sum(right) / len(right) - sum(wrong) / len(wrong),
        },
        rel=1e-4,
    )
    assert 0 < len(rows) < 16 and caught.trainer.store.last_id() == 0, "no lesson is written"


METRICS = ("mel/taught_rows", "mel/without_notes", "mel/over_context", "mel/taught_tokens", "mel/teacher_shift")


@pytest.mark.parametrize("form", ["kl", "sampled"])
def test_the_students_log_probs_are_not_read_again_where_they_are_known(tmp_path: Path, form: str) -> None:
    """With several updates per batch, TRL has the policy's own log-probs of the rollouts."""
    read, options = [], {"context": "sibling", "form": form}

    def watch(trainer: Any) -> None:
        score = trainer.scorer._score

        def see(rows: Any, *arguments: Any, **named: Any) -> Any:
            read.append(len(rows))
            return score(rows, *arguments, **named)

        trainer.scorer._score = see

    once = catch(tmp_path / "a", change=watch, internalisation="distill", internalisation_options=options)
    taught = int(sum(note_of(once, row, context="sibling") is not None for row in range(16)))
    assert read == [taught, taught]
    read.clear()
    twice = catch(
        tmp_path / "b", change=watch, num_iterations=2, max_steps=2, internalisation="distill",
        internalisation_options=options,
    )  # fmt: skip
    assert read == [taught] and "old_per_token_logps" in twice.before
    for name in ("teacher_mask", "teacher_hidden") if form == "kl" else ("advantages",):
        assert torch.allclose(once.after[name].float(), twice.after[name].float(), atol=1e-4), name


def test_completions_masked_as_a_whole_and_abstained_ones_are_not_taught(tmp_path: Path) -> None:
    caught = catch(
        tmp_path, mask_truncated_completions=True, max_completion_length=18, internalisation="distill",
        internalisation_options={"context": "none", "reader": "frozen", "sign": False},
    )  # fmt: skip
    cut = [not mask_C.any() for mask_C in caught.before["completion_mask"]]
    assert any(cut) and not all(cut)
    assert caught.after["teacher_mask"].any(dim=1).tolist() == [not each for each in cut]
    rollouts = [(group, replace(rollout, verdict=Verdict.ABSTAIN)) for group, rollout in caught.rows]
    trainer, batch = caught.trainer, RolloutBatch(tuple(rollouts), caught.before)
    assert trainer.internalisation.batch_entries(caught.drawn, batch, trainer.scorer) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contxt": "own"}, "'distill' has no option 'contxt'; it takes context, .* Did you mean 'context'"),
        ({"context": "siblings"}, "internalisation_options.context='siblings' is not one of own, bank, sibling"),
        ({"form": "js"}, "internalisation_options.form='js' is not one of kl, sampled"),
        ({"reader": "ema"}, "internalisation_options.reader='ema' is not one of moving, frozen"),
        ({"mask": True}, "internalisation_options.mask=True is not one of all, fork, shift"),
        ({"sign": "false"}, "internalisation_options.sign='false' is a str. Set it to true or false"),
        ({"shift_nats": -0.1}, "internalisation_options.shift_nats=-0.1 must be a number 0 or more"),
        ({"clip_nats": 0}, "internalisation_options.clip_nats=0 must be a number above 0"),
        ({"clip_nats": "5"}, "internalisation_options.clip_nats='5' must be a number above 0"),
        ({"context": "none", "shuffled": True}, "shuffled=True with context='none': there are no notes"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_internalisation("distill", options)


def test_a_trained_head_is_refused_where_the_divergence_needs_it(tmp_path: Path) -> None:
    options = {"internalisation": "distill", "lora": False}
    for needs in ({"context": "sibling"}, {"context": "sibling", "form": "sampled", "mask": "shift"}):
        with pytest.raises(ConfigError, match=r"under one head, but the model's head \(Linear\) is trained. Train a"):
            build(tmp_path, internalisation_options=needs, **options)
    build(tmp_path, internalisation_options={"context": "sibling", "form": "sampled"}, **options)
