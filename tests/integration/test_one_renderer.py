"""Every stage sees the same tokens for the same messages: those of TRL, unless its rendering loses a system turn."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from trl.trainer.grpo_trainer import GRPOTrainer

from chat_templates import SYSTEM, TEMPLATES, tokenizer_that_adds, tokenizer_with
from mel_lite import MELTrainer
from mel_lite.evaluate import evaluate
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES
from mel_lite.models.chat import question_text, render
from mel_lite.recipe import build_args, resolve
from mel_lite.run.tasks import load_run_tasks
from mel_lite.types import Group, Prompt, Verdict
from mel_lite.warmup.examples import Example, tokenize
from scripted import ScriptedEngine
from tiny_models import CHAT_TEMPLATE, save_tiny
from trainers import assert_learned, build, sums

FIRST_ANSWER = [{"role": "assistant", "content": "5"}, {"role": "user", "content": "Sure? What is 3 plus 2?"}]
PREFIX = "Answer the question."


def with_system(question: str) -> Prompt:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def plain(question: str) -> Prompt:
    return f"{PREFIX}\nQ: {question}\nA:"


CASES: dict[str, tuple[Any, Callable[[str], Prompt]]] = {
    **{kind: (tokenizer_with(template.source), with_system) for kind, template in TEMPLATES.items()},
    "plain text": (tokenizer_with(None), plain),
    "plain text, begin token": (tokenizer_that_adds("<|im_start|> $A"), plain),
    "plain text, end token": (tokenizer_that_adds("<|im_start|> $A <|im_end|>"), plain),
}


def sum_asked(text: str) -> int:
    return sum(map(int, re.findall(r"\d+", text)[-2:]))


def run(folder: Path, tokenizer: Any, rows: Dataset) -> tuple[MELTrainer, dict[str, list[tuple[int, ...]]]]:
    """Train one MEL step of `rows`; return the trainer and the prompts of every stage, in order."""
    save_tiny(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    wrong = itertools.cycle([0, 1])  # so that every group is mixed
    engine = ScriptedEngine(tokenizer, answer=lambda text, rng: f"Answer: {sum_asked(text) + next(wrong)}")
    trainer = build(folder, engine=engine, train_dataset=rows, max_steps=1, replay_control=True)
    trainer.train()
    prompts: dict[str, list[tuple[int, ...]]] = {"rollout": [], "analysis": [], "replay": [], "control": []}
    for i, (requests, _) in enumerate(engine.calls):
        for request in requests:
            text = tokenizer.decode(request.prompt_ids)
            stage = "analysis" if text.endswith("## Bifurcation\n") else "replay" if "<notes>" in text else "control"
            prompts["rollout" if i == 0 else stage].append(request.prompt_ids)
    return trainer, prompts


def all_right(groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
    return [Verdict.RIGHT] * len(texts)


def contains(ids: tuple[int, ...], part: tuple[int, ...]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


@pytest.mark.parametrize("case", CASES)
def test_every_stage_sees_the_same_tokens(tmp_path: Path, case: str) -> None:
    tokenizer, prompt_of = CASES[case]
    rows = sums().map(lambda row: {"prompt": prompt_of(row["prompt"][0]["content"])})
    trainer, seen = run(tmp_path, tokenizer, rows)
    assert_learned(trainer)
    assert all(seen.values()), "a stage did not run"
    expected = {render(row["prompt"], tokenizer): row["prompt"] for row in rows}
    if case in TEMPLATES:
        first = "What is 3 plus 2?"
        template = TEMPLATES[case]
        assert tokenizer.decode(render(prompt_of(first), tokenizer)) == template.expected
    assert set(seen["rollout"]) <= set(expected)
    assert set(seen["control"]) <= set(seen["rollout"])

    engine = ScriptedEngine(tokenizer)
    evaluate(engine, tokenizer, rows, all_right, k=1, max_new_tokens=16)
    evaluated = {request.prompt_ids for requests, _ in engine.calls for request in requests}
    assert evaluated == set(expected)

    warmup_rows, _ = tokenize([Example(p, "5") for p in expected.values()], tokenizer, max_length_tokens=512)
    learned = {tuple(row["input_ids"][: row["labels"].count(-100)]) for row in warmup_rows}
    assert learned == set(expected)

    questions = [tuple(tokenizer(question_text(p), add_special_tokens=False)["input_ids"]) for p in expected.values()]
    for stage in ("analysis", "replay"):
        assert all(any(contains(ids, question) for question in questions) for ids in seen[stage])
    for replay in map(tokenizer.decode, seen["replay"]):
        notes = replay[replay.index(DEFAULT_TEMPLATES.replay_user[:20]) : replay.index("and answer.\n\n") + 13]
        controls = [tokenizer.decode(ids) for ids in seen["control"]]
        assert replay.replace(notes, "") in controls, "with the notes removed, a replay's prompt is its control's"


@pytest.mark.parametrize("kind", ["rejects", "drops", "takes"])
def test_the_length_check_counts_the_tokens_of_rollouts(tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[kind].source)
    save_tiny(tmp_path / "base")
    rows = sums().map(lambda row: {"prompt": with_system(row["prompt"][0]["content"])})
    rows.to_json(tmp_path / "tasks.jsonl")
    overrides = [("model.name", str(tmp_path / "base")), ("data.train", str(tmp_path / "tasks.jsonl"))]
    shorter = [("train.max_completion_length", 16), ("data.eval", None), ("train.gradient_accumulation_steps", 1)]
    recipe = resolve(preset="cpu", overrides=[*overrides, *shorter])
    tasks = load_run_tasks(recipe, build_args(recipe, tmp_path / "run"), tokenizer)
    assert tasks.longest_prompt_tokens == max(len(render(row["prompt"], tokenizer)) for row in rows)


# ---- equal to TRL's tokens

TRLS_TEMPLATES = [
    path
    for path in sorted(Path(trl.__file__).with_name("chat_templates").glob("*.jinja"))
    if not path.stem.startswith(("idefics3", "llava_next", "smolvlm"))  # they render no content that is plain text
]

PROMPTS: list[Prompt] = [
    [{"role": "user", "content": "What is 3 plus 2?"}],
    with_system("What is 3 plus 2?"),
    [*with_system("What is 3 plus 2?"), *FIRST_ANSWER],
    [*with_system("What is 3 plus 2?"), FIRST_ANSWER[0]],
    [{"role": "user", "content": " \u00fcber\n\n  <think> \u4f60\u597d "}],
]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> MELTrainer:
    return build(tmp_path_factory.mktemp("trl"), chat_template_kwargs={"think": False})


def tokenized(trainer: MELTrainer, tokenizer: Any, prompts: list[Prompt]) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts of our trainer and of TRL's, tokenized by `tokenizer`."""
    trainer.processing_class = trainer._tokenizer = tokenizer
    ids, images, fields = trainer._tokenize_prompts(prompts)
    assert images is None and fields == {}
    return ids, GRPOTrainer._tokenize_prompts(trainer, prompts)[0]


@pytest.mark.parametrize("kind", [kind for kind, template in TEMPLATES.items() if template.uses_system])
def test_rollout_prompts_are_trls_for_templates_that_use_system_turns(trainer: MELTrainer, kind: str) -> None:
    """The last turn of a conversation may be the assistant's: TRL does not continue it, so neither does `render`."""
    tokenizer = tokenizer_with(TEMPLATES[kind].source + "{% if think is false %}<think></think>{% endif %}")
    ours, trls = tokenized(trainer, tokenizer, PROMPTS)
    assert ours == trls
    assert [render(p, tokenizer, chat_template_kwargs={"think": False}) for p in PROMPTS] == [tuple(i) for i in trls]
    assert all(tokenizer.decode(ids).endswith("<think></think>") for ids in trls)


@pytest.mark.parametrize("path", TRLS_TEMPLATES, ids=lambda path: path.stem)
def test_prompts_are_trls_for_the_chat_templates_of_well_known_models(path: Path) -> None:
    """Gemma's rejects system turns; each of the others uses them, and some render a default when there is none."""
    tokenizer = tokenizer_that_adds("$A", path.read_text(encoding="utf-8"))
    for prompt in PROMPTS[:3]:
        assert isinstance(prompt, list)
        turns = prompt
        if path.stem in ("gemma", "gemma_training") and prompt[0]["role"] == "system":
            turns = [{"role": "user", "content": f"{SYSTEM}\n\n{prompt[1]['content']}"}, *prompt[2:]]
        expected = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)["input_ids"]
        assert list(render(prompt, tokenizer)) == expected


@pytest.mark.parametrize("single", ["$A", "<|im_start|> $A"], ids=["no begin token", "begin token"])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, None], ids=["chat model", "base model"])
def test_rollout_prompts_of_plain_text_are_trls(trainer: MELTrainer, single: str, template: str | None) -> None:
    prompts: list[Prompt] = ["Q: 2+3?\nA:", "", " ", "\u4f60\u597d <|im_end|> x", "a" * 700]
    ours, trls = tokenized(trainer, tokenizer_that_adds(single, template), prompts)
    assert ours == trls


def test_tools_and_content_in_parts_are_left_to_trl(trainer: MELTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return a + b

    source = "{% for tool in tools or [] %}{{ tool['function']['name'] }}{% endfor %}"
    trainer.processing_class = trainer._tokenizer = tokenizer_with(source + CHAT_TEMPLATE)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "tools", [add])
        ids, _, _ = trainer._tokenize_prompts(PROMPTS[:1])
    assert trainer._tokenizer.decode(ids[0]).startswith("add<|im_start|>user\nWhat is 3 plus 2?")
    trainer._tokenizer.chat_template = CHAT_TEMPLATE.replace("m['content']", "m['content'][0]['text']")
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 3 plus 2?"}]}]
    assert trainer._tokenize_prompts([parts])[0] == GRPOTrainer._tokenize_prompts(trainer, [parts])[0]
