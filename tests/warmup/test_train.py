"""Warm-up: the demo's examples are correct and match MEL's prompts, and training on them gives a usable adapter."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
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
from demo_warmup.examples import COUNTS as COUNTS_SHIPPED
from demo_warmup.examples import SEED, make_examples, write_examples
from demo_warmup.phrases import WORDINGS
from demo_warmup.problems import LAST_LINE, SLIPS, draw_problem, draw_slip, write_solution
from mel_lite.data import demo_tasks
from mel_lite.errors import ConfigError, DataError
from mel_lite.lessons.leak_guard import check_leak
from mel_lite.lessons.parsing import parse_analysis
from mel_lite.lessons.prompts import DEFAULT_TEMPLATES, analysis_prompt, replay_prompt
from mel_lite.models.adapters import RECORD, WEIGHTS, LoraSpec, attach_adapter
from mel_lite.models.chat import render
from mel_lite.models.demo import DEMO_ADAPTER
from mel_lite.models.load import ModelSpec, load_base, load_tokenizer
from mel_lite.types import Finish, Group, Pair, Rollout, Verdict
from mel_lite.verify.verifiers import get_verifier
from mel_lite.warmup.examples import Example, load_examples, tokenize
from mel_lite.warmup.train import WarmupEval, WarmupOptions, in_batches, warmup
from tiny_models import CHAT_TEMPLATE, save_tiny, tiny_tokenizer

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


# ---- the generator ---------------------------------------------------------------------------------------------------


def test_examples_depend_on_the_seed_alone(tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    assert write_examples(tmp_path / "a.jsonl", COUNTS, seed=3) == sum(COUNTS.values())
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == examples
    assert make_examples(COUNTS, seed=4) != examples


def test_examples_use_no_test_question() -> None:
    tests = {expression_in(json.loads(line)["prompt"]) for line in demo_tasks.path("test").read_text().splitlines()}
    assert len(tests) == 100
    used = {expression_in(e["prompt"][-1]["content"]) for e in make_examples({"solve": 3000, "replay": 300}, seed=5)}
    assert len(used) > 2000 and not used & tests


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


# ---- examples of any origin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"rows\.jsonl, line 2: '{' is not JSON"),
        ("[1]", r"line 2: '\[1\]' is not an object"),
        ('{"prompt": "x"}', r"line 2: column 'completion' is missing; it has 'prompt'"),
        ('{"prompt": "", "completion": "y"}', "line 2, column 'prompt': '' is empty"),
        ('{"prompt": 3, "completion": "y"}', "line 2, column 'prompt': 3 is neither text nor messages"),
        ('{"prompt": [], "completion": "y"}', "line 2, column 'prompt'"),
        (
            '{"prompt": [{"role": "user"}], "completion": "y"}',
            "column 'prompt': .* has a message that is not .*'content'",
        ),
        (
            '{"prompt": [{"role": "robot", "content": "a"}], "completion": "y"}',
            "'robot'.* has a message that is not {'role': system",
        ),
        ('{"prompt": [{"role": "assistant", "content": "a"}], "completion": "y"}', "ends with an assistant turn"),
        ('{"prompt": "x", "completion": "  "}', "line 2, column 'completion': '  ' is not text"),
        ('{"prompt": "x", "completion": null}', "line 2, column 'completion': None is not text"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "x", "completion": "y"}\n' + row + "\n")
    with pytest.raises(DataError, match=message):
        load_examples(file)


def test_unreadable_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        load_examples(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no examples"):
        load_examples(tmp_path / "empty.jsonl")


def test_trl_conversational_completions_are_read(tmp_path: Path) -> None:
    turn = [{"role": "assistant", "content": "four"}]
    prompt = [{"role": "user", "content": "2 + 2?"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "completion": turn, "other": 1}))
    assert load_examples(tmp_path / "rows.jsonl") == [Example(prompt, "four")]


def test_examples_are_read_by_the_rules_for_tasks(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "name": "add", "content": "4"}]  # fmt: skip
    rows = [{"question": "2+2?", "reply": "four"}, {"question": turns, "reply": "five"}]
    plain, asked = "2+2?", [turns[0], turns[1] | {"content": ""}, turns[2]]
    for name, content in (("a.json", json.dumps(rows, indent=1)), ("b.jsonl", "\r\n".join(map(json.dumps, rows)))):
        (tmp_path / name).write_text(content)
        examples = load_examples(tmp_path / name, completion_column="reply")
        assert examples == [Example(plain, "four"), Example(asked, "five")]
    with_system = load_examples(tmp_path / "a.json", completion_column="reply", system_prompt="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    assert [example.prompt for example in with_system] == [
        [system, {"role": "user", "content": plain}],
        [system, *asked],
    ]
    with pytest.raises(
        DataError, match=r"a.json, row 1: column 'completion' is missing; .*completion_column \(--compl"
    ):
        load_examples(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"row 1: column 'ask' is missing; .* prompt_column \(--prompt-column\)"):
        load_examples(tmp_path / "a.json", prompt_column="ask", completion_column="reply")


def test_only_the_completion_is_learned_and_it_ends_the_turn() -> None:
    tokenizer = tiny_tokenizer()
    chat = Example([{"role": "user", "content": "2 + 2?"}], "four")
    (row,), skipped = tokenize([chat], tokenizer, max_length_tokens=200, turn_end=2)
    prompt_ids = list(render(chat.prompt, tokenizer))
    assert row["input_ids"][: len(prompt_ids)] == prompt_ids
    assert row["labels"][: len(prompt_ids)] == [-100] * len(prompt_ids)
    learned = row["labels"][len(prompt_ids) :]
    assert learned == row["input_ids"][len(prompt_ids) :] and learned[-1] == 2
    assert tokenizer.decode(learned[:-1]) == "four" and skipped == 0


def test_long_examples_are_left_out_whole() -> None:
    tokenizer = tiny_tokenizer()
    short, long = Example("a", "b"), Example("a" * 50, "b")  # 3 and 52 tokens
    rows, skipped = tokenize([long, short], tokenizer, max_length_tokens=3)
    assert [len(row["input_ids"]) for row in rows] == [3] and skipped == 1
    with pytest.raises(DataError, match="None of the 2 examples fits 2 tokens; the shortest has 3"):
        tokenize([long, short], tokenizer, max_length_tokens=2)


def test_batches_hold_rows_of_similar_length_and_all_rows() -> None:
    rows = [
        {"input_ids": [i] * length, "labels": []} for i, length in enumerate([10, 50, 11, 52, 12, 51, 90, 91, 92, 9])
    ]
    ordered = in_batches(rows, 3, seed=0)
    assert sorted(map(str, ordered)) == sorted(map(str, rows))
    lengths = [len(row["input_ids"]) for row in ordered]
    batches = [sorted(lengths[i : i + 3]) for i in range(0, 10, 3)]
    assert sorted(batches) == [[9, 10, 11], [12, 50, 51], [52, 90, 91], [92]] and batches[-1] == [92]
    assert in_batches(rows, 3, seed=0) == ordered and in_batches(rows, 3, seed=1) != ordered


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"batch_size": 4, "micro_batch_size": 3}, {"learning_rate": 0.0}, {"epochs": 0}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        WarmupOptions(**options)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path]:
    """Warm up a tiny model on two examples, one of which exceeds its 512 tokens. Return folder, result and file."""
    folder = tmp_path_factory.mktemp("warmup")
    save_tiny(folder / "base")
    rows = [
        {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "completion": "Answer: 4"},
        {"prompt": [{"role": "user", "content": "x" * 600}], "completion": "Answer: 5"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = [{"prompt": "What is 2 + 2?", "answer": "4"}]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    result = warmup(
        folder / "rows.jsonl",
        folder / "out",
        model=ModelSpec(str(folder / "base")),
        lora=LoraSpec(r=8, alpha=16),
        options=WarmupOptions(max_steps=60, batch_size=1, learning_rate=1e-2, save_steps=30),
        evaluation=WarmupEval(str(folder / "tasks.jsonl"), verifier="numeric", k=2, max_new_tokens=16),
    )
    return folder, result, folder / "rows.jsonl"


def nll_nats(model: Any, tokenizer: Any, file: Path) -> float:
    """Compute the mean NLL per completion token of the first example from plain logits."""
    rows, _ = tokenize(load_examples(file)[:1], tokenizer, max_length_tokens=512, turn_end=2)
    ids, labels = (torch.tensor([rows[0][name]]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], ignore_index=-100))


def test_warmup_learns_the_example_and_measures_it(trained: tuple[Path, Any, Path]) -> None:
    folder, result, file = trained
    assert (result.examples, result.skipped_long, result.steps) == (1, 1, 60)
    assert result.trained_tokens == len("Answer: 4") + 1
    spec = ModelSpec(str(folder / "base"))
    tokenizer = load_tokenizer(spec)
    untrained = nll_nats(load_base(spec), tokenizer, file)
    learned = nll_nats(attach_adapter(load_base(spec), result.adapter), tokenizer, file)
    assert learned < 0.1 < 1.0 < untrained
    assert result.before.pass_at_1.value == 0.0 and result.after.pass_at_1.value == 1.0


@pytest.mark.parametrize("max_steps", [3, 10])
def test_warmup_loss_is_the_mean_over_completion_tokens(
    trained: tuple[Path, Any, Path], tmp_path: Path, max_steps: int
) -> None:
    folder, _, file = trained
    spec = ModelSpec(str(folder / "base"))
    expected = nll_nats(load_base(spec), load_tokenizer(spec), file)
    options = WarmupOptions(max_steps=max_steps, batch_size=1, learning_rate=1e-12)
    result = warmup(file, tmp_path / "out", model=spec, lora=LoraSpec(r=4), options=options)
    assert math.isclose(result.final_loss_nats, expected, rel_tol=1e-3)


def test_training_continues_from_the_adapter(trained: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, file = trained
    spec = ModelSpec(str(folder / "base"))
    assert json.loads((result.adapter / RECORD).read_text())["base"]["name"] == spec.name
    assert (result.adapter / "checkpoint-30" / WEIGHTS).is_file()
    own = CHAT_TEMPLATE + "{# of the adapter #}"
    (result.adapter / "chat_template.jinja").write_text(own)
    again = warmup(
        file,
        tmp_path / "more",
        model=spec,
        adapter=result.adapter,
        options=WarmupOptions(max_steps=10, batch_size=1, learning_rate=1e-3),
    )
    assert load_tokenizer(spec, saved_in=again.adapter).chat_template == own
    assert again.final_loss_nats < 0.1  # it started where the first warm-up ended
    assert nll_nats(attach_adapter(load_base(spec), again.adapter), load_tokenizer(spec), file) < 0.1


def test_nothing_is_overwritten_and_contradictions_are_rejected(
    trained: tuple[Path, Any, Path], tmp_path: Path
) -> None:
    folder, result, file = trained
    spec = ModelSpec(str(folder / "base"))
    before = (result.adapter / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="is not empty"):
        warmup(file, result.adapter, model=spec)
    assert (result.adapter / WEIGHTS).read_bytes() == before
    with pytest.raises(ConfigError, match="lora and adapter together"):
        warmup(file, tmp_path / "new", model=spec, lora=LoraSpec(), adapter=result.adapter)


# ---- the shipped adapter ---------------------------------------------------------------------------------------------


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


def test_shipping_rounds_to_float16_and_drops_local_paths(trained: tuple[Path, Any, Path], tmp_path: Path) -> None:
    folder, result, _ = trained
    train.ship(result.adapter, tmp_path / "shipped")
    before, after = load_file(result.adapter / WEIGHTS), load_file(tmp_path / "shipped" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(after[name].float(), tensor, rtol=2**-11, atol=1e-7)
    assert str(folder) not in (tmp_path / "shipped" / "adapter_config.json").read_text()
    assert json.loads((tmp_path / "shipped" / RECORD).read_text())["base"]["dtype"] == "auto"
