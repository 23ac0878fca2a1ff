"""One batch of a trainer that teaches, caught with unchanged weights, and distributions from full logits."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer

from mel_lite.lessons.internalise import DrawnBatch
from mel_lite.lessons.prompts import question_prompt, replay_prompt
from mel_lite.text import common_prefix_tokens
from mel_lite.types import Group, Rollout, Verdict
from scripted import ScriptedEngine
from tiny_models import save_tiny, set_lora
from trainers import build, digest, trainable

OPTIONS: dict[str, Any] = {
    "gradient_accumulation_steps": 2,
    "max_completion_length": 32,
    "max_steps": 1,
    "learning_rate": 0.0,  # the weights stay as they were when the batch was read
    "temperature": 0.7,
    "mel_weight": 0.3,
    "pairs_per_group": 2,
}


def answer(question: str, rng: random.Random) -> str:
    """Return a right answer half of the time; always for two equal numbers, and never when the second is 7."""
    a, b = map(int, re.findall(r"\d+", question)[-2:])
    opening = rng.choice(("I add. ", "I count up. ", "So "))
    is_wrong = a != b and (b == 7 or rng.random() < 0.5)
    return f"{opening}Answer: {a + b + is_wrong}"


def varied(rng: random.Random) -> str:
    """Well-formed analyses that differ."""
    word = rng.choice(("apples", "the sign", "tens", "fingers", "signs first", "units"))
    return (
        f"The wrong solution parts where it counts {word}.\n\n## Critique\nIt took {word} for granted instead of "
        f"reading. Read {word} before computing anything.\n\n## Heuristics\n- If two numbers are joined, then read "
        f"{word} before computing.\n"
    )


class Rules:
    """Stand-in for a lesson bank: two rules for every other question."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def retrieve(self, question: str) -> list[Any]:
        self.asked.append(question)
        return [SimpleNamespace(heuristic=f" {text} ") for text in self.rules(question)]

    @staticmethod
    def rules(question: str) -> list[str]:
        a, b = map(int, re.findall(r"\d+", question))
        return [f"- If {a} is first, then say {b}.", f"- If {b} is last, count {a} up."] if (a + b) % 2 else []


@dataclass
class Caught:
    """One generation batch on its way through the trainer."""

    trainer: Any
    drawn: DrawnBatch | None = None
    rows: list[tuple[Group, Rollout]] = field(default_factory=list)
    """Rollouts in row order, each with the whole group."""
    before: dict[str, Any] = field(default_factory=dict)
    """TRL's batch before the internalization."""
    after: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, list[float]] = field(default_factory=dict)
    """Metrics of the generation batch."""
    micro_batches: list[dict[str, Any]] = field(default_factory=list)
    """What the training forward receives; `row` holds the row numbers."""

    def prompt(self, row: int, note: str | None) -> tuple[int, ...]:
        """Prompt ids of a row's question, with a note or without."""
        context, group = self.trainer.lesson_context, self.rows[row][0]
        if not note:
            return question_prompt(group, context.tokenizer)
        return replay_prompt(group, note, context.tokenizer, context.templates)

    def log_softmax(self, row: int, note: str | None = None) -> torch.Tensor:
        """Log-probs (T, V) over the vocabulary along a row's completion, from the model's own logits."""
        prompt, completion = self.prompt(row, note), self.rows[row][1].completion_ids
        logits_1TV = self.trainer.model(input_ids=torch.tensor([prompt + completion])).logits
        logits_TV = logits_1TV[0, len(prompt) - 1 : -1].double()
        return (logits_TV / self.trainer.temperature).log_softmax(dim=-1)

    def picked(self, row: int, note: str | None = None) -> torch.Tensor:
        """Log-probs (T,) of a row's completion ids."""
        ids_T = torch.tensor(self.rows[row][1].completion_ids)
        return self.log_softmax(row, note).gather(1, ids_T[:, None])[:, 0]


def catch(folder: Path, *, bank: Any = None, change: Any = None, analysis: Any = None, **options: Any) -> Caught:
    """Train one step of a teaching trainer at learning rate 0; the adapter is not the one it started with."""
    save_tiny(folder / "base")
    scripts = {"answer": answer} | ({} if analysis is None else {"analysis": analysis})
    engine = ScriptedEngine(AutoTokenizer.from_pretrained(folder / "base"), **scripts)
    trainer = build(folder, engine=engine, **OPTIONS | options)
    if change is not None:
        change(trainer)
    set_lora(trainer.model, 0.2)
    caught = Caught(trainer)
    draw, internalise, loss = trainer._draw, trainer._internalise, trainer._compute_loss

    def see_draw(groups: list[Group]) -> DrawnBatch:
        drawn = draw(groups)
        return drawn if bank is None else replace(drawn, bank=bank)

    def see_batch(drawn: DrawnBatch, batch: dict[str, Any], scored: Any) -> dict[str, Any]:
        caught.drawn, caught.before = drawn, dict(batch)
        whole = {rollout.index: group for group in drawn.groups for rollout in group.rollouts}
        caught.rows = [(whole[rollout.index], rollout) for _, rollout in scored.rollouts]
        caught.after = internalise(drawn, batch, scored) | {"row": torch.arange(len(caught.rows))}
        caught.logged = {name: list(values) for name, values in trainer._metrics["train"].items()}
        return caught.after

    def see_loss(model: Any, inputs: dict[str, Any]) -> Any:
        caught.micro_batches.append(inputs)
        return loss(model, inputs)

    start = digest(trainable(trainer))
    trainer._draw, trainer._internalise, trainer._compute_loss = see_draw, see_batch, see_loss
    trainer.train()
    trainer._draw, trainer._internalise, trainer._compute_loss = draw, internalise, loss
    assert digest(trainable(trainer)) == start, "the weights moved"
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return caught


def distinct(micro_batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches without the repetitions that parts make."""
    return list({tuple(each["row"].tolist()): each for each in micro_batches}.values())


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Take the gradients that have accumulated, by name."""
    taken = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return taken


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = 5e-5) -> None:
    assert got.keys() == expected.keys() and any(grad.any() for grad in expected.values())
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= relative * grad.norm() + 1e-9, name


def note_of(caught: Caught, row: int, *, context: str, per_prompt: str = "one", group: Any = None) -> str | None:
    """The notes that a row's teacher should read, spelled out for each source; `group` offers them."""
    own, rollout = caught.rows[row]
    group = group or own
    turn = own.rollouts.index(rollout)
    if context == "none":
        return ""
    if context in ("sibling", "sibling+bank") and group.wrong:
        others = [each.text for each in group.right if each is not rollout]
        if others:
            return others[turn % len(others)]
    if context == "sibling":
        return None
    if context == "own":
        kept = [each.text for _, each in caught.drawn.kept if each.analysis.pair.group == group]
        joined, head = "\n\n".join(kept), ""
    else:
        kept = Rules.rules(group.prompt[0]["content"])
        joined, head = "\n".join(kept), "## Heuristics\n"
    if not kept:
        return None
    return head + (joined if per_prompt == "all" else kept[turn % len(kept)])


def shuffled_note(caught: Caught, row: int, *, context: str, per_prompt: str = "one") -> str | None:
    """The notes of the next group that has some."""
    number = caught.drawn.groups.index(caught.rows[row][0])
    for group in (*caught.drawn.groups[number + 1 :], *caught.drawn.groups[:number]):
        offers = [note_of(caught, i, context=context) for i, (g, _) in enumerate(caught.rows) if g is group]
        if any(offers) or (context == "sibling" and group.is_mixed):
            return note_of(caught, row, context=context, per_prompt=per_prompt, group=group)
    return None


def expected_row(
    caught: Caught, row: int, note: str | None, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(student || teacher), the tokens that are taught, and the teacher's log ratio, each (T,), from full logits."""
    group, rollout = caught.rows[row]
    frozen = options.get("reader") == "frozen"
    reading = caught.trainer.model.disable_adapter if frozen else nullcontext  # LoRA-B was 0 at the start
    student_TV = caught.log_softmax(row)
    with torch.no_grad(), reading():
        teacher_TV, without_TV = caught.log_softmax(row, note), caught.log_softmax(row)
    kl_T = (student_TV.exp() * (student_TV - teacher_TV)).sum(dim=1)
    ids_T1 = torch.tensor(rollout.completion_ids)[:, None]
    gain_T = (teacher_TV - student_TV.detach()).gather(1, ids_T1)[:, 0]
    use_T = torch.full_like(gain_T, True, dtype=torch.bool)
    if options.get("sign", True):
        use_T = gain_T > 0 if rollout.verdict is Verdict.RIGHT else gain_T < 0
    if options.get("mask") == "fork":
        rivals = group.wrong if rollout.verdict is Verdict.RIGHT else group.right
        shared = [common_prefix_tokens(rollout.completion_ids, each.completion_ids) for each in rivals]
        use_T[: max(shared, default=0)] = False
    if options.get("mask") == "shift":
        moved_T = (teacher_TV.exp() * (teacher_TV - without_TV)).sum(dim=1)
        use_T &= moved_T > options["shift_nats"]
    if options.get("rows") == "wrong" and rollout.verdict is Verdict.RIGHT:
        use_T = torch.zeros_like(use_T)
    return kl_T, use_T, gain_T


def expected_rows(caught: Caught, options: dict[str, Any]) -> dict[int, tuple[torch.Tensor, ...]]:
    """`expected_row` of the rows that have notes."""
    find = shuffled_note if options.get("shuffled") else note_of
    chosen = {key: options[key] for key in ("context", "per_prompt") if key in options}
    notes = {row: find(caught, row, **chosen) for row in range(len(caught.rows))}
    return {row: expected_row(caught, row, note, options) for row, note in notes.items() if note is not None}


def loss_gradients(trainer: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of a loss by name of the trained weight; nothing is accumulated."""
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
