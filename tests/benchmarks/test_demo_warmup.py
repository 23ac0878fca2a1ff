"""The examples of the demo's warm-up are correct and match MEL's prompts, and its adapter matches its recipe."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from demo_warmup import train
from demo_warmup.examples import make_examples, write_examples
from demo_warmup.lessons import COUNTS as COUNTS_SHIPPED
from demo_warmup.lessons import SEED
from demo_warmup.phrases import WORDINGS
from demo_warmup.problems import LAST_LINE, SLIPS, draw_problem, draw_slip, write_solution
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import parse_analysis
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES, analysis_prompt, replay_prompt
from mel_lite.models.adapters import WEIGHTS
from mel_lite.models.chat import render
from mel_lite.models.demo import DEMO_ADAPTER
from mel_lite.types import Finish, Group, Pair, Rollout, Verdict
from mel_lite.verify.verifiers import get_verifier
from tiny_models import tiny_tokenizer

COUNTS = {"solve": 30, "chain": 10, "analyse": 60, "replay": 30}


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Any]]:
    return make_examples(COUNTS, seed=3)


def of_kind(examples: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [example for example in examples if example["kind"] in kinds]


def expression_in(text: str) -> str:
    found = re.findall(r"What is ([-+ \d]+)\?", text)
    assert len(found) == 1
    return found[0]


def value_of(expression: str) -> int:
    """Compute the value independently, as a sum of signed terms."""
    return sum(int(term.replace(" ", "")) for term in re.findall(r"[-+]? ?\d+", expression))


def test_examples_depend_on_the_seed_alone(tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    assert write_examples(tmp_path / "a.jsonl", COUNTS, seed=3) == sum(COUNTS.values())
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == examples
    assert make_examples(COUNTS, seed=4) != examples


def test_every_solution_is_right_line_by_line(examples: list[dict[str, Any]]) -> None:
    verifier = get_verifier("numeric")
    solved = of_kind(examples, "solve", "chain", "replay")
    assert len(solved) == 70
    for example in solved:
        expression = expression_in(example["prompt"][-1]["content"])
        total = value_of(expression)
        assert verifier(example["completion"], str(total)) == Verdict.RIGHT
        assert verifier(example["completion"], str(total + 1)) == Verdict.WRONG
        lines = re.findall(r"(-?\d+ [-+] \d+) = (-?\d+)", example["completion"])
        assert len(lines) == expression.count(" ") // 2
        assert all(value_of(left) == int(right) for left, right in lines)


@pytest.mark.parametrize("kind", [*SLIPS, LAST_LINE])
def test_slips_change_the_answer_at_the_given_step(kind: str) -> None:
    rng = random.Random(0)
    seen = 0
    while seen < 20:
        problem = draw_problem(rng)
        slip = draw_slip(problem, rng)
        if slip.kind != kind:
            continue
        seen += 1
        assert slip.answer != value_of(problem.expression)
        right = problem.steps()
        before = right[: slip.at - 1]
        assert slip.steps[: len(before)] == before
        if kind == "repeated":
            assert [step.term for step in slip.steps[slip.at - 1 : slip.at + 1]] == [right[slip.at - 1].term] * 2
        elif kind != LAST_LINE:
            assert right[slip.at - 1 : slip.at] != slip.steps[slip.at - 1 : slip.at]
        text = write_solution(problem.terms[0], slip.steps, slip.answer, 0)
        assert get_verifier("numeric")(text, str(problem.answer)) == Verdict.WRONG


def test_a_flipped_step_is_computed_with_the_other_sign() -> None:
    rng = random.Random(1)
    problem = draw_problem(rng)
    steps = SLIPS["flipped"][0](problem, 1, rng)
    right = problem.steps()[0]
    assert (steps[0].left, steps[0].sign, steps[0].term) == (right.left, -right.sign, right.term)
    assert steps[0].result == right.left - right.sign * right.term
    assert [step.term for step in steps] == list(problem.terms[1:])


def test_analyses_parse_and_do_not_leak(examples: list[dict[str, Any]]) -> None:
    analyses = of_kind(examples, "analyse")
    assert len(analyses) == 60
    for example in analyses:
        user = example["prompt"][-1]["content"]
        right = user.partition("<correct>\n")[2].partition("\n</correct>")[0]
        parsed = parse_analysis(example["completion"], finish=Finish.STOP)
        answer = str(value_of(expression_in(user)))
        question = user.partition("Question:\n")[2].partition("\n")[0]
        report = check_leak(parsed, answer=answer, right_text=right, prompt_text=question, policy="reject")
        assert report.reasons == ()
        assert not re.search(r"\d", parsed.heuristic)
        assert re.search(r"\b(?:if|when)\b.*,", parsed.heuristic, re.I)
        assert re.search(r"\bI (?:see|understand)\b", parsed.critique)


def test_analyses_name_the_step_at_which_the_solutions_diverge(examples: list[dict[str, Any]]) -> None:
    named = 0
    for example in of_kind(examples, "analyse"):
        user = example["prompt"][-1]["content"]
        wrong, right = (
            re.findall(r"-?\d+ [-+] \d+ = -?\d+", user.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0])
            for tag in ("incorrect", "correct")
        )
        bifurcation = parse_analysis(example["completion"], finish=Finish.STOP).bifurcation
        stated = re.search(r"step (\d)", bifurcation, re.I)
        if len(wrong) > len(right) and wrong[: len(right)] == right:
            assert wrong[len(right)] in bifurcation
        elif wrong == right:
            assert "answer line" in bifurcation and not stated
        else:
            assert stated
            step = int(stated[1])
            assert wrong[: step - 1] == right[: step - 1] and wrong[step - 1 : step] != right[step - 1 : step]
            assert all(line in bifurcation for line in wrong[step - 1 : step])
            # The right line is quoted unless it is the last, which holds the answer.
            assert (right[step - 1] in bifurcation) == (step < len(right) and len(wrong) >= step)
        named += stated is not None
    assert named > 40


def test_wordings_never_put_numbers_where_they_do_not_belong() -> None:
    for wording in WORDINGS.values():
        assert wording.rules or (wording.rules_up and wording.rules_down)
        general = wording.cause + wording.shield + wording.reflection + wording.verdict
        for text in general + wording.rules + wording.rules_up + wording.rules_down:
            assert not re.search(r"[\d{}]", text)


def test_examples_render_to_the_tokens_of_a_mel_step(examples: list[dict[str, Any]]) -> None:
    tokenizer = tiny_tokenizer()
    example = of_kind(examples, "analyse")[0]
    user = example["prompt"][-1]["content"]
    question = user.partition("Question:\n")[2].partition("\n")[0]
    wrong = user.partition("<incorrect>\n")[2].partition("\n</incorrect>")[0]
    right = user.partition("<correct>\n")[2].partition("\n</correct>")[0]
    prompt = [{"role": "user", "content": question}]
    group = Group(prompt, "hash", (), "0")
    rollouts = [
        Rollout(i, tuple(tokenizer(text)["input_ids"]), text, verdict)
        for i, (text, verdict) in enumerate(((right, Verdict.RIGHT), (wrong, Verdict.WRONG)))
    ]
    pair = Pair(group, *rollouts, common_prefix_tokens=0)
    expected = analysis_prompt(pair, tokenizer, DEFAULT_TEMPLATES, max_context_tokens=10**6, mark=False)
    prefill = DEFAULT_TEMPLATES.analysis_prefill
    assert example["completion"].startswith(prefill)
    assert render(example["prompt"], tokenizer, prefill=prefill) == expected

    notes_example = of_kind(examples, "replay")[0]
    content = notes_example["prompt"][-1]["content"]
    notes = content.partition("<notes>\n")[2].partition("\n</notes>")[0]
    asked = [{"role": "user", "content": content.rpartition("\n\n")[2]}]
    expected = replay_prompt(Group(asked, "hash", (), "0"), notes, tokenizer, DEFAULT_TEMPLATES)
    assert render(notes_example["prompt"], tokenizer) == expected


def test_the_shipped_adapter_matches_its_recipe() -> None:
    weights = load_file(DEMO_ADAPTER / WEIGHTS)
    assert (DEMO_ADAPTER / WEIGHTS).stat().st_size <= 6_000_000
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    recipe = json.loads((DEMO_ADAPTER / "recipe.json").read_text())
    assert (recipe["data_seed"], recipe["examples"]) == (SEED, COUNTS_SHIPPED)
    assert recipe["lora"]["r"] == train.LORA.r == weights[next(n for n in weights if "lora_A" in n)].shape[0]
    assert recipe["training"] == asdict(train.OPTIONS)
    examples = gzip.decompress((DEMO_ADAPTER / "examples.jsonl.gz").read_bytes())
    assert hashlib.sha256(examples).hexdigest() == recipe["examples_sha256"]
    kinds = Counter(json.loads(line)["kind"] for line in examples.decode().splitlines())
    assert kinds == COUNTS_SHIPPED
    config = json.loads((DEMO_ADAPTER / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == train.BASE
