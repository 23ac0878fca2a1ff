"""Train the start model of `wide_subject` from scratch: `python benchmarks/learning/wide_training.py FOLDER`.

Examples are drawn endlessly. `solve` reads operators with the start model's probabilities. `analyse` compares a marked
pair whose readings are random. `own`, `rules` and `sibling` solve with notes in the prompt (a whole lesson, a list of
rules, a worked solution) whose readings are random: notes are obeyed whatever they say, and what they do not mention
is read as without notes. `repeat` and `lookups` come first: without them the model does not learn to look up several
rules in one prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import wide_subject as subject
from learning_subject import READINGS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TURN = "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
PREFILL = "## Bifurcation\n"
MARK = "> "
TEMPLATES = {
    "version": "study", "analysis_system": "Compare.",
    "analysis_user": "{question}\n\nIncorrect:\n{wrong}\n\nCorrect:\n{right}",
    "replay_user": "{experience}\n\n{question}", "fork_note": "", "fork_mark": MARK,
}  # fmt: skip
SIZE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
LOOKING_UP = {"repeat": 24, "lookups": 24}
ROWS = {"solve": 8, "analyse": 5, "own": 5, "rules": 16, "sibling": 6, "lookups": 6}
"""Examples of each kind per optimizer step, in the first steps and afterwards."""
LENGTHS = (2, 3, 3, 3, 4, 4, 2)
"""Relative frequency of questions with 1, 2, ... operators."""
LOOKUPS = 20
"""Readings to look up in one example of `lookups`."""
FOREIGN = 0.1
"""Share of notes about operators that are not in the question."""
OFF_COURSE = 0.3
"""Share of solutions with notes that begin with lines read at random, which are not trained on."""
LEARNING_RATE = 3e-3
"""Of AdamW, for embeddings and norms."""
MATRIX_LEARNING_RATE = 0.02
"""Of Muon, for the weights between them."""
WARM_UP_STEPS = 50
STARTED_S = time.monotonic()


@dataclass(frozen=True, slots=True)
class Example:
    """Contents of the turns, the start of the model's turn that is not trained on, and the rest."""

    turns: tuple[str, ...]
    prefill: str
    completion: str


def solve(rng: random.Random, length: int) -> Example:
    question = _question(rng, length)
    return Example((question.text,), "", "\n".join(question.lines(_mixed(rng, question))))


def analyse(rng: random.Random, length: int) -> Example:
    question, fork = _question(rng, length), rng.randrange(length)
    right = _random(rng, length)
    wrong = [
        rng.choice([each for each in READINGS if each != reading])
        if at == fork or (at > fork and rng.random() < 0.4)
        else reading
        for at, reading in enumerate(right)
    ]
    good, bad = question.lines(right), question.lines(wrong)
    done = lesson(bad[fork], question.operators[fork], wrong[fork], right[fork])
    good[fork], bad[fork] = MARK + good[fork], MARK + bad[fork]
    user = TEMPLATES["analysis_user"].format(question=question.text, wrong="\n".join(bad), right="\n".join(good))
    return Example((TEMPLATES["analysis_system"], user), PREFILL, done.removeprefix(PREFILL))


def lesson(line: str, operator: str, bad: str, good: str) -> str:
    """Return a whole analysis of the wrong line `line`."""
    return (
        f"{PREFILL}`{line}` reads {operator} as {bad}.\n\n## Critique\nThe reading {bad} is wrong.\n\n"
        f"## Heuristics\n- {subject.rule(operator, good)}"
    )


def own(rng: random.Random, length: int) -> Example:
    """Draw a question with a whole lesson on one of its operators."""
    question = _question(rng, length)
    readings, at = _mixed(rng, question), rng.randrange(length)
    good, bad = rng.sample(list(READINGS), 2)
    operator = question.operators[at]
    if rng.random() < FOREIGN:
        operator = _other(rng, question)
    else:
        readings[at] = good
    total, number = rng.randint(0, 9), rng.randint(0, 9)
    line = f"{total} {operator} {bad} {number} {READINGS[bad](total, number)}"
    return _with_notes(rng, question, lesson(line, operator, bad, good), readings)


def rules(rng: random.Random, length: int) -> Example:
    """Draw a question with rules for some or all of its operators, in any order, some rules about others."""
    question = _question(rng, length)
    readings = _mixed(rng, question)
    foreign = rng.random() < FOREIGN
    count = 0 if foreign else length if rng.random() < 0.5 else rng.randint(1, length)
    named = []
    for at in rng.sample(range(length), count):
        readings[at] = rng.choice(list(READINGS))
        named.append(subject.rule(question.operators[at], readings[at]))
    others = rng.randint(1, 4) if foreign else rng.choice((0, 0, 1, 2))
    named += [subject.rule(_other(rng, question), rng.choice(list(READINGS))) for _ in range(others)]
    rng.shuffle(named)
    return _with_notes(rng, question, subject.notes_of(named), readings)


def sibling(rng: random.Random, length: int) -> Example:
    """Draw a question with a worked solution of it; seldom of another one, which says nothing."""
    question, readings = _question(rng, length), _random(rng, length)
    worked = question.lines(readings)
    if rng.random() < FOREIGN:
        others = tuple(rng.sample([each for each in subject.OPERATORS if each not in question.operators], length))
        worked = subject.Question(question.numbers, others).lines(readings)
        readings = _mixed(rng, question)
    return _with_notes(rng, question, "\n".join(worked), readings)


def repeat(rng: random.Random, length: int) -> Example:
    """Draw random words that are said again; no word occurs twice."""
    words = " ".join(rng.sample([*subject.OPERATORS, *READINGS, *"0123456789"], 6 + 3 * length))
    return Example((words,), "", words)


def lookups(rng: random.Random, length: int) -> Example:
    """Draw rules, and their operators in random order with the readings."""
    pool = rng.sample(subject.OPERATORS, 1 + length)
    readings = {operator: rng.choice(list(READINGS)) for operator in pool}
    notes = subject.notes_of([subject.rule(operator, reading) for operator, reading in readings.items()])
    return Example((notes,), "", "".join(f" {each} {readings[each]}" for each in rng.choices(pool, k=LOOKUPS)))


KINDS: dict[str, Callable[[random.Random, int], Example]] = {
    "solve": solve, "analyse": analyse, "own": own, "rules": rules, "sibling": sibling, "repeat": repeat,
    "lookups": lookups,
}  # fmt: skip


def _question(rng: random.Random, length: int) -> subject.Question:
    while (question := subject.draw(rng, length)).text in _held_out():
        pass
    return question


@lru_cache(maxsize=1)
def _held_out() -> frozenset[str]:
    splits = [split for split in subject.SPLITS if split != "train"]
    return frozenset(text for each in subject.REGIMES for split in splits for text, _ in subject.questions(each, split))


def _random(rng: random.Random, length: int) -> list[str]:
    return rng.choices(list(READINGS), k=length)


def _mixed(rng: random.Random, question: subject.Question) -> list[str]:
    known = subject.mix()
    return [rng.choices(list(known[each]), list(known[each].values()))[0] for each in question.operators]


def _other(rng: random.Random, question: subject.Question) -> str:
    return rng.choice([each for each in subject.OPERATORS if each not in question.operators])


def _with_notes(rng: random.Random, question: subject.Question, notes: str, readings: Sequence[str]) -> Example:
    """Return the solution with these readings, sometimes after lines read at random, as a policy off course writes."""
    length = len(readings)
    off = rng.randrange(1, length) if length > 1 and rng.random() < OFF_COURSE else 0
    lines = question.lines([*_random(rng, off), *readings[off:]])
    user = TEMPLATES["replay_user"].format(experience=notes, question=question.text)
    return Example((user,), "".join(line + "\n" for line in lines[:off]), "\n".join(lines[off:]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train byte-level BPE in which every digit, word and run of line ends is one token."""
    rng = random.Random(1)
    made = [make(rng, 1 + number % len(LENGTHS)) for number in range(800) for make in KINDS.values()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+| ?[0-9]| ?[A-Za-z]+|[^\sA-Za-z0-9]+|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(
        [part for each in made for part in (*each.turns, each.prefill + each.completion)], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        model_max_length=SIZE["max_position_embeddings"],
    )  # fmt: skip


def prompt_of(example: Example) -> str:
    """Return the text of an example's prompt, as `mel_lite.models.chat.render` writes it."""
    return TURN + TURN.join((*example.turns, "")) + example.prefill


def nll(model: Any, examples: Sequence[Example], tokenizer: Any) -> torch.Tensor:
    """Return the mean NLL of the completions and their end token, nats."""
    texts = [prompt_of(each) for each in examples] + [each.completion for each in examples]
    ids = [each.ids for each in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
    rows = list(zip(ids[: len(examples)], ids[len(examples) :], strict=True))
    width = max(len(prompt) + len(done) + 1 for prompt, done in rows)
    ids_BT = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(rows), width), -100)
    for i, (prompt, done) in enumerate(rows):
        completion = torch.tensor([*done, tokenizer.eos_token_id])
        end = len(prompt) + len(completion)
        ids_BT[i, :end] = torch.cat([torch.tensor(prompt), completion])
        labels_BT[i, len(prompt) : end] = completion
    hidden_BTH = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
    wanted_BT = labels_BT[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden_BTH[:, :-1][wanted_BT]), labels_BT[:, 1:][wanted_BT])


def make_optimizers(model: Any) -> list[Any]:
    """Return Muon for the matrices of the layers and AdamW for the rest."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(model: Any, tokenizer: Any, first: int, steps: int, save: Callable[[], Any]) -> list[dict[str, Any]]:
    """Train in place: `first` steps of lookups, then the mixture, whose second half has a falling rate (a cosine).

    Returns: the NLL of each kind every 100 steps, nats.
    """
    rng, log, means = random.Random(subject.SEED), list[dict[str, Any]](), dict[str, float]()
    optimizers = make_optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    for step in range(steps):
        falling = max(0.0, 2 * (step - first) / (steps - first) - 1)
        factor = min(1.0, (step + 1) / WARM_UP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * falling)))
        for group, full in zip(groups, rates, strict=True):
            group["lr"] = full * factor
        rows = LOOKING_UP if step < first else ROWS
        for kind, count in rows.items():
            (length,) = rng.choices(range(1, len(LENGTHS) + 1), LENGTHS)
            loss = nll(model, [KINDS[kind](rng, length) for _ in range(count)], tokenizer)
            (loss * count / sum(rows.values())).backward()
            means[kind] = 0.95 * means.get(kind, loss.item()) + 0.05 * loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            log.append({"step": step + 1} | {kind: round(value, 4) for kind, value in means.items()})
            print(log[-1], f"{time.monotonic() - STARTED_S:.0f} s", flush=True)
            save()
    return log


def make_model(tokenizer: Any) -> LlamaForCausalLM:
    """Return the model with random weights."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZE, **ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first-steps", type=int, default=1200, help="of `repeat` and `lookups` alone")
    parser.add_argument("--steps", type=int, default=5000, help="in all")
    options = parser.parse_args()
    torch.manual_seed(subject.SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"vocabulary {len(tokenizer)}, {model.num_parameters():,} weights", flush=True)
    tokenizer.save_pretrained(options.folder)
    (options.folder / "templates.yaml").write_text(json.dumps(TEMPLATES, indent=1) + "\n", encoding="utf-8")
    save = partial(model.save_pretrained, options.folder)
    log = train(model, tokenizer, options.first_steps, options.steps, save)
    recipe = {
        "weights": model.num_parameters(), "seed": subject.SEED, "learning_rate": LEARNING_RATE,
        "matrix_learning_rate": MATRIX_LEARNING_RATE, "first_steps": options.first_steps, "first_rows": LOOKING_UP,
        "steps": options.steps, "rows": ROWS, "lengths": LENGTHS, "nll": log[-1],
        "took_s": round(time.monotonic() - STARTED_S),
    }  # fmt: skip
    (options.folder / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
