"""The demo's warm-up examples: right arithmetic, flawed readings at given rates, analyses in MEL's prompts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from demo_warmup.lessons import LONG, P_RIGHT, made_pairs, make_examples, rule, write_examples
from mel_lite.data import demo_tasks
from mel_lite.data.demo_tasks.words import MEANINGS, READINGS
from mel_lite.lessons.fork import find_fork
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import parse_analysis
from mel_lite.lessons.prompts import analysis_prompt, load_templates, replay_prompt
from mel_lite.lessons.quotes import locate_quote
from mel_lite.models.chat import render
from mel_lite.types import Finish, Group, Pair, Rollout, Verdict
from tiny_models import tiny_tokenizer

COUNTS = {"solve": 1200, "analyze": 60, "replay": 200}
LINE = re.compile(r"(-?\d+) (\w+) (adds|takes|swaps) (\d+): (-?\d+) ([-+]) (-?\d+) = (-?\d+)")
TEMPLATES = load_templates("demo")


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Any]]:
    return make_examples(COUNTS, seed=3)


def of_kind(examples: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [example for example in examples if example["kind"] == kind]


def expression_in(text: str) -> str:
    (found,) = re.findall(r"What is ([^?]+)\?", text)
    return found


def readings_in(solution: str, expression: str) -> dict[str, str]:
    """Check a solution of an expression line by line, and return how it reads each word."""
    *lines, answer = solution.split("\n")
    first, *rest = expression.split()
    total, found = int(first), {}
    for line, word, number in zip(lines, rest[::2], map(int, rest[1::2]), strict=True):
        match = LINE.fullmatch(line)
        assert match and (int(match[1]), match[2], int(match[4])) == (total, word, number)
        a, b, result = int(match[5]), int(match[7]), int(match[8])
        assert (a, match[6], b) == {
            "adds": (total, "+", number), "takes": (total, "-", number), "swaps": (number, "-", total)
        }[match[3]]  # fmt: skip
        assert result == (a + b if match[6] == "+" else a - b)
        total, found[word] = result, match[3]
    assert answer == f"Answer: {total}"
    return found


def test_examples_depend_on_the_seed_alone(tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    assert write_examples(tmp_path / "a.jsonl", COUNTS, seed=3) == sum(COUNTS.values())
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == examples
    assert make_examples(COUNTS, seed=4) != examples


def test_examples_use_no_test_question(examples: list[dict[str, Any]]) -> None:
    tests = {expression_in(json.loads(line)["prompt"]) for line in demo_tasks.path("test").read_text().splitlines()}
    used = {expression_in(example["prompt"][-1]["content"]) for example in examples}
    assert len(tests) == 100 and len(used) > 1200 and not used & tests


def test_solutions_read_each_word_rightly_at_its_rate(examples: list[dict[str, Any]]) -> None:
    right, seen = Counter[str](), Counter[str]()
    for example in of_kind(examples, "solve"):
        for word, reading in readings_in(example["completion"], expression_in(example["prompt"][0]["content"])).items():
            seen[word] += 1
            right[word] += reading == MEANINGS[word]
    assert set(seen) == set(MEANINGS) and min(seen.values()) > 150
    for word, p_right in P_RIGHT.items():
        assert right[word] / seen[word] == pytest.approx(p_right, abs=0.12), word


def test_half_of_the_solutions_without_notes_have_four_steps(examples: list[dict[str, Any]]) -> None:
    steps = Counter(example["completion"].count("\n") for example in of_kind(examples, "solve"))
    assert set(steps) == {2, 4} and steps[4] / steps.total() == pytest.approx(LONG, abs=0.05)


def test_a_solution_with_notes_follows_their_rules(examples: list[dict[str, Any]]) -> None:
    followed, wrong_rules = 0, 0
    for example in of_kind(examples, "replay"):
        content = example["prompt"][0]["content"]
        for word, reading in readings_in(example["completion"], expression_in(content)).items():
            rules = [other for other in READINGS if rule(word, other) in content]
            if rules:
                assert rules == [reading]
                followed += 1
                wrong_rules += reading != MEANINGS[word]
    assert followed > 100
    assert wrong_rules / followed == pytest.approx(2 / 3, abs=0.15), "a rule is obeyed, whatever it says"


def test_analyses_quote_the_wrong_line_teach_the_right_reading_and_do_not_leak() -> None:
    kinds = Counter[str]()
    for pair in made_pairs(120, seed=8):
        parsed = parse_analysis(pair.analysis, finish=Finish.STOP)
        fork = find_fork(pair.right, pair.wrong).wrong
        assert fork.of(pair.wrong) == pair.wrong_line
        assert locate_quote(parsed.bifurcation, pair.wrong, fork=fork) == fork
        answer = pair.right.rpartition(" ")[2]
        assert answer != pair.wrong.rpartition(" ")[2]
        assert not check_leak(
            parsed, answer=answer, right_text=pair.right, prompt_text=pair.chain.question, policy="reject",
            raw_text=pair.analysis,
        ).leaks  # fmt: skip
        readings = readings_in(pair.right, pair.chain.expression)
        taught = [rule(word, reading) for word, reading in readings.items()]
        kinds["misread" if parsed.heuristic in taught else parsed.heuristic.partition(":")[0]] += 1
        assert not re.search(r"\d", parsed.heuristic)
    assert set(kinds) == {"misread", "- Count"} and kinds["misread"] > 90


def test_examples_render_to_the_tokens_of_a_mel_step(examples: list[dict[str, Any]]) -> None:
    tokenizer = tiny_tokenizer()
    example = of_kind(examples, "analyze")[0]
    user = example["prompt"][-1]["content"]
    question = user.partition("Question:\n")[2].partition("\n")[0]
    wrong = user.partition("Wrong solution:\n")[2].partition("\n\n")[0].replace("> ", "")
    right = user.partition("Right solution:\n")[2].partition("\n\n")[0].replace("> ", "")
    rollouts = [
        Rollout(i, tuple(tokenizer(text)["input_ids"]), text, verdict)
        for i, (text, verdict) in enumerate(((right, Verdict.RIGHT), (wrong, Verdict.WRONG)))
    ]
    pair = Pair(Group([{"role": "user", "content": question}], "hash", (), "0"), *rollouts, common_prefix_tokens=0)
    expected = analysis_prompt(pair, tokenizer, TEMPLATES, max_context_tokens=10**6)
    assert user.count("\n> ") == 2 and example["completion"].startswith(TEMPLATES.analysis_prefill)
    assert render(example["prompt"], tokenizer, prefill=TEMPLATES.analysis_prefill) == expected

    content = of_kind(examples, "replay")[0]["prompt"][-1]["content"]
    notes, asked = content.removeprefix("My notes:\n").rsplit("\n\n", 1)
    group = Group([{"role": "user", "content": asked}], "hash", (), "0")
    expected = replay_prompt(group, notes, tokenizer, TEMPLATES)
    assert render(of_kind(examples, "replay")[0]["prompt"], tokenizer) == expected
