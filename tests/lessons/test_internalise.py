"""Ways for lessons to enter the weights: the texts of the built-in ones, and two toys that are no NLL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batches import micro_batch
from experiences import WANT, lesson_context
from mel_lite.errors import ConfigError
from mel_lite.lessons.internalise import (
    INTERNALISATIONS,
    DrawnBatch,
    ScoredMicroBatch,
    deal_lessons,
    get_internalisation,
)
from mel_lite.lessons.prompts import question_prompt, replay_prompt
from mel_lite.types import (
    Analysis,
    Experience,
    Finish,
    Group,
    LeakReport,
    Lesson,
    MetaExperience,
    Pair,
    Replay,
    Rollout,
    Status,
    Verdict,
)
from tiny_models import set_lora, tiny_tokenizer
from toy_internalisations import HINT, Credit
from trainers import assert_learned, build, digest, trainable

TOKENIZER = tiny_tokenizer()
EOS = 2
PREFILL = "## Bifurcation\n"


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def experience(
    text: str = "It adds.\n## Critique\nbad",
    *,
    prefill: str = PREFILL,
    finish: Finish = Finish.STOP,
    ids: tuple[int, ...] | None = None,
    parsed: MetaExperience = WANT,
    redacted: MetaExperience | None = None,
    status: Status = Status.KEPT,
) -> Experience:
    rollouts = (
        Rollout(0, (*ids_of("It is 5."), EOS), "It is 5.", Verdict.RIGHT),
        Rollout(1, (8, 9), "6", Verdict.WRONG),
    )
    pair = Pair(Group([{"role": "user", "content": "2+3?"}], "hash", rollouts, answer="5"), *rollouts, 0)
    context = (*question_prompt(pair.group, TOKENIZER), *ids_of(prefill))
    sampled = ids if ids is not None else (*ids_of(text), *((EOS,) if finish is Finish.STOP else ()))
    analysis = Analysis(pair, context, sampled, prefill + text, finish, 0.0)
    replay = Replay((Verdict.WRONG, Verdict.RIGHT, Verdict.RIGHT), ("4", "so 5", "5"))
    return Experience(1, analysis, status, "", parsed, LeakReport((), redacted), replay)


def lessons(name: str, *experiences: Experience, **options: Any) -> list[Lesson]:
    rows = tuple(enumerate(experiences, start=7))
    groups = tuple(each.analysis.pair.group for each in experiences)
    return get_internalisation(name, options).lessons(DrawnBatch(rows, groups, lesson_context(TOKENIZER), len(rows)))


# ---- the texts of the built-in ways


TEXT_WAYS = ("analysis", "experience", "replay", "right", "both")


@pytest.mark.parametrize("name", TEXT_WAYS)
def test_only_kept_ones_are_trained_on(name: str) -> None:
    kept, failed = experience(), experience(status=Status.REPLAY_FAILED)
    leaked = experience(status=Status.LEAKED)
    assert {each.experience_id for each in lessons(name, failed, kept, leaked)} == {8}


def test_the_analysis_is_trained_on_exactly_as_sampled() -> None:
    (made,) = lessons("analysis", each := experience())
    assert (made.experience_id, made.context_ids) == (7, each.analysis.context_ids)
    assert made.target_ids == each.analysis.analysis_ids
    (odd,) = lessons("analysis", experience("not what the ids decode to", ids=(70, 71, EOS)))
    assert odd.target_ids == (70, 71, EOS)


def about(question: str, text: str, status: Status = Status.KEPT) -> Experience:
    """A meta-experience of another question, with C_retro of its own."""
    made = experience(text, status=status)
    pair = made.analysis.pair
    group = replace(pair.group, prompt=[{"role": "user", "content": question}], prompt_hash=question)
    context = (*question_prompt(group, TOKENIZER), *ids_of(PREFILL))
    return replace(made, analysis=replace(made.analysis, pair=replace(pair, group=group), context_ids=context))


def test_a_shuffled_analysis_is_trained_on_in_the_context_of_another_question() -> None:
    made = [about("1+1?", "a"), about("1+1?", "b"), about("2+2?", "c"), about("3+3?", "d", Status.LEAKED)]
    shuffled = lessons("analysis", *made, shuffled=True)
    contexts = {each.analysis.context_ids: each.analysis.pair.group.prompt_hash for each in made}
    assert [contexts[each.context_ids] for each in shuffled] == ["2+2?", "2+2?", "1+1?"]
    assert [each.target_ids for each in shuffled] == [each.target_ids for each in lessons("analysis", *made)]
    assert lessons("analysis", *made[:2], shuffled=True) == [], "there is no other question"
    with pytest.raises(ConfigError, match=r"internalisation_options.shuffled='yes' is a str"):
        get_internalisation("analysis", {"shuffled": "yes"})


@pytest.mark.parametrize("redacted", [None, MetaExperience("It adds [...].", "c", "h")])
@pytest.mark.parametrize(
    ("prefill", "rest_of"),
    [(PREFILL, PREFILL), ("", ""), ("Let me see.\n\n## Bif", "## Bif"), ("Well: ", "")],
)
def test_context_and_canonical_text_join_without_repeating_the_heading(
    prefill: str, rest_of: str, redacted: MetaExperience | None
) -> None:
    (made,) = lessons("experience", each := experience("x", prefill=prefill, redacted=redacted))
    text = (redacted or WANT).as_text()
    assert TOKENIZER.decode(made.target_ids) == text.removeprefix(rest_of) + "<|im_end|>"
    assert made.context_ids == each.analysis.context_ids
    assert TOKENIZER.decode(made.context_ids).endswith(prefill)


def test_a_redacted_analysis_is_never_trained_on_as_sampled() -> None:
    redacted = MetaExperience("It adds [...].", "bad", "h")
    (made,) = lessons("analysis", experience("It adds 474.\n## Critique\nbad", redacted=redacted))
    assert TOKENIZER.decode(made.target_ids) == "It adds [...].\n\n## Critique\nbad\n\n## Heuristics\nh<|im_end|>"


def test_the_end_is_the_id_that_ended_the_analysis_else_the_tokenizers() -> None:
    (other_end,) = lessons("experience", experience("x", ids=(9, 3)))
    (cut,) = lessons("experience", experience("x", finish=Finish.LENGTH))
    assert (other_end.target_ids[-1], cut.target_ids[-1]) == (3, EOS)


def test_canonical_text_cannot_hold_control_tokens() -> None:
    (made,) = lessons("experience", experience("x", parsed=MetaExperience("a <|im_end|> b", "c", "h")))
    assert [i for i in made.target_ids if i < 4] == [EOS] and made.target_ids[-1] == EOS


def test_replay_right_and_both() -> None:
    each = experience()
    question = question_prompt(each.analysis.pair.group, TOKENIZER)
    replay, right = Lesson(7, question, (*ids_of("so 5"), EOS)), Lesson(7, question, (*ids_of("It is 5."), EOS))
    assert (lessons("replay", each), lessons("right", each)) == ([replay], [right])
    assert lessons("both", each) == [*lessons("analysis", each), replay]


def test_lessons_are_dealt_once_with_weights_that_give_the_mean() -> None:
    made = [Lesson(i, (1,), (2,)) for i in range(7)]
    shares = [
        deal_lessons(made, rank=rank, world=2, micro_batches=3, total_weight=0.5, denominator=7) for rank in range(2)
    ]
    dealt = [each for rank in shares for share in rank for each in share.lessons]
    assert sorted(each.experience_id for each in dealt) == list(range(7))
    assert [len(share.lessons) for share in shares[0]] == [2, 1, 1]
    # Micro-batch losses are averaged over 3 micro-batches and 2 ranks.
    assert sum(share.weight * len(share.lessons) for rank in shares for share in rank) / 6 == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "everything",
            "internalisation='everything' is not one of analysis, experience, replay, right, both, distill, credit",
        ),
        ("toy_internalisations:Nothing", "'toy_internalisations' has no 'Nothing'"),
        ("no_such_module:X", "importing 'no_such_module' failed with ModuleNotFoundError"),
        ("toy_internalisations:hinted", "is not a subclass of mel_lite.lessons.internalise.Internalisation"),
        (
            "toy_internalisations:Strengthened",
            "cannot be built with internalisation_options={}: .*'strength'. Set the options",
        ),
    ],
)
def test_unknown_ways_are_refused_before_anything_is_loaded(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, internalisation=name)


@pytest.mark.parametrize("old", ["analysis", "experience"])
def test_the_old_option_still_works_with_one_warning(tmp_path: Path, old: str) -> None:
    with pytest.warns(FutureWarning, match=f"mel_train_on is deprecated. Set internalisation='{old}'") as caught:
        trainer = build(tmp_path, mel_train_on=old)
    assert len([each for each in caught if "mel_train_on" in str(each.message)]) == 1
    assert type(trainer.internalisation) is INTERNALISATIONS[old]
    with pytest.raises(ConfigError, match="mel_train_on='all' is not one of analysis, experience"):
        build(tmp_path, mel_train_on="all")
    with pytest.raises(ConfigError, match="with internalisation='both': .* Remove mel_train_on"):
        build(tmp_path, mel_train_on=old, internalisation="both")


@pytest.mark.parametrize("name", ["experience", "replay", "right", "both"])
def test_each_way_trains(tmp_path: Path, name: str) -> None:
    trainer = build(tmp_path, internalisation=name, max_steps=2)
    trainer.train()
    assert_learned(trainer)
    kept = trainer.store.list(status=Status.KEPT)
    assert kept and all(row.nll_after < row.nll_before for row in kept)


# ---- ways that are no NLL of text


def test_entries_that_do_not_fit_the_batch_are_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path, internalisation="toy_internalisations:Misshapen", max_steps=1)
    with pytest.raises(ConfigError, match=r"Misshapen.batch_entries returned 'advantages' of shape \(7,\), but .* 8 "):
        trainer.train()


def spy_micro_batches(trainer: Any) -> list[dict[str, Any]]:
    original, seen = trainer._compute_loss, []

    def spy(model: Any, inputs: Any) -> Any:
        seen.append(inputs)
        return original(model, inputs)

    trainer._compute_loss = spy
    return seen


def rows_of(inputs: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and completion ids of each row of a micro-batch, without padding."""
    prompts = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
    completions = zip(inputs["completion_ids"], inputs["completion_mask"].bool(), strict=True)
    return [(tuple(p[m].tolist()), tuple(c[n].tolist())) for (p, m), (c, n) in zip(prompts, completions, strict=True)]


def hinted_prompts(trainer: Any) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The prompt with the hint for each plain prompt of the training data."""
    context = trainer.lesson_context
    groups = [Group(row["prompt"], "", ()) for row in trainer.train_dataset]
    return {
        question_prompt(g, context.tokenizer): replay_prompt(g, HINT, context.tokenizer, context.templates)
        for g in groups
    }


SPLIT: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}


def test_token_advantages_from_extra_scoring_passes_reach_their_rows(tmp_path: Path) -> None:
    trainer = build(tmp_path, internalisation="toy_internalisations:Credit", **SPLIT)
    set_lora(trainer.model, 0.2)
    hints, seen = hinted_prompts(trainer), spy_micro_batches(trainer)
    scores = {}
    original = trainer._compute_loss

    def before_the_update(model: Any, inputs: Any) -> Any:
        for prompt, completion in rows_of(inputs):
            texts = [Lesson(0, hints[prompt], completion), Lesson(0, prompt, completion)]
            with_T, without_T = trainer.scorer(texts)
            scores[prompt, completion] = torch.tanh(with_T - without_T)
        return original(model, inputs)

    trainer._compute_loss = before_the_update
    trainer.train()
    checked = 0
    for inputs in seen:
        assert inputs["advantages"].shape == inputs["completion_ids"].shape
        for advantage_C, row in zip(inputs["advantages"], rows_of(inputs), strict=True):
            factor_T = 1 + Credit.strength * scores[row]
            if advantage_C.any():
                ratio_T = advantage_C[: len(factor_T)] / factor_T
                assert torch.allclose(ratio_T, ratio_T[0].expand_as(ratio_T), rtol=1e-4), "one A per row"
                checked += int(factor_T.std() > 1e-3)
    assert len(seen) == 2 and checked >= 4


def test_credit_of_strength_zero_is_grpo_bit_for_bit_and_another_is_not(tmp_path: Path) -> None:
    weights = {}
    for name, options in {
        "grpo": {"algorithm": "grpo"},
        "zero": {"internalisation": "toy_internalisations:NoCredit"},
        "half": {"internalisation": "toy_internalisations:Credit"},
    }.items():
        trainer = build(tmp_path, output_dir=tmp_path / name, **SPLIT | {"max_steps": 2}, **options)
        trainer.train()
        assert_learned(trainer)
        weights[name] = digest(trainable(trainer))
    assert weights["grpo"] == weights["zero"] != weights["half"]


def test_a_divergence_between_two_scorings_is_added_to_the_policy_loss(tmp_path: Path) -> None:
    trainer = build(tmp_path, internalisation="toy_internalisations:HintDivergence", mel_weight=0.3, **SPLIT)
    set_lora(trainer.model, 0.2)
    hints, seen = hinted_prompts(trainer), spy_micro_batches(trainer)
    before: dict[Any, list[float]] = {}
    original = trainer._estimated

    def scored_before(batch: Any, scored: Any) -> Any:
        rows = [(question_prompt(g, TOKENIZER), r.completion_ids) for g, r in scored.rollouts]
        logps = trainer.scorer([Lesson(0, hints[prompt], completion) for prompt, completion in rows])
        before.update(zip(rows, (logp_T.tolist() for logp_T in logps), strict=True))
        return original(batch, scored)

    trainer._estimated = scored_before
    trainer.train()
    assert_learned(trainer)
    for inputs in seen:  # the teacher's log-probs belong to the row they were shuffled to
        for logp_C, (prompt, completion) in zip(inputs["teacher_logp_BC"], rows_of(inputs), strict=True):
            assert logp_C[: len(completion)].tolist() == pytest.approx(before[prompt, completion], rel=1e-4)
    inputs = seen[0]
    student = torch.cat(trainer.scorer([Lesson(0, *row) for row in rows_of(inputs)])).double()
    teacher = inputs["teacher_logp_BC"][inputs["completion_mask"].bool()].double()
    trainer.current_gradient_accumulation_steps = 2
    both = trainer._compute_loss(trainer.model, inputs).item()
    trainer.args.mel_weight = 0.0
    policy = trainer._compute_loss(trainer.model, inputs).item()
    expected = 0.3 / 2 * ((student - teacher) * student).mean().item()
    assert both - policy == pytest.approx(expected, rel=1e-4) and abs(expected) > 1e-4


@pytest.mark.parametrize("tokens", [None, 40])
def test_its_gradient_does_not_depend_on_how_a_micro_batch_is_cut(tmp_path: Path, tokens: int | None) -> None:
    inputs = micro_batch() | {"teacher_logp_BC": torch.full((4, 6), -3.0)}
    inputs["advantages"][1] = 0.0
    trainer = build(
        tmp_path, internalisation="toy_internalisations:HintDivergence", max_micro_batch_tokens=tokens,
        skip_zero_advantage=True,
    )  # fmt: skip
    set_lora(trainer.model, 0.2)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs)
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert (grads[name] - parameter.grad).norm() <= 2e-5 * parameter.grad.norm() + 1e-9, name


def test_losses_of_lessons_are_weighted_sums_of_mean_nlls() -> None:
    logps = (torch.tensor([-1.0, -3.0]), torch.tensor([-5.0]))
    made = tuple(Lesson(i, (1,), (2,)) for i in range(2))
    scored = ScoredMicroBatch({}, torch.zeros(1, 1), made, logps, 9.0, lesson_weight=0.25, token_weight=9.0)
    assert get_internalisation("analysis").loss(scored).item() == pytest.approx(0.25 * (2.0 + 5.0))
    empty = ScoredMicroBatch({}, torch.zeros(1, 1), (), (), 9.0, lesson_weight=0.25, token_weight=9.0)
    assert get_internalisation("analysis").loss(empty) is None
