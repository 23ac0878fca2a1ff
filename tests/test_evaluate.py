"""Estimators against hand-computed values, and what evaluation asks of engine and judge."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from mel_lite.engines.base import Completion, Request, Sampling
from mel_lite.engines.hf import HFEngine
from mel_lite.errors import ConfigError, DataError, ModelError
from mel_lite.evaluate import EvalResult, bootstrap_interval, evaluate, evaluate_model, pass_at_k
from mel_lite.intervals import share_of_tasks, wilson
from mel_lite.models.load import ModelSpec, context_length, eos_ids, load_base, load_tokenizer
from mel_lite.seeds import prompt_hash, seed_for
from mel_lite.types import Finish, Group, Verdict
from tiny_adapters import make_adapter
from tiny_models import CHAT_TEMPLATE, save_tiny, tiny_tokenizer

# --- estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (4, 1, 2, 0.5),  # 1 - 3/6
        (5, 2, 3, 0.9),  # 1 - 1/10
        (10, 3, 1, 0.3),  # k = 1 is the mean
        (8, 0, 8, 0.0),
        (8, 1, 8, 1.0),
        (8, 8, 1, 1.0),
        (3, 2, 2, 1.0),  # fewer wrong ones than k
    ],
)
def test_pass_at_k_by_hand(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples() -> None:
    for n, k in ((6, 1), (6, 3), (7, 5)):
        for c in range(n + 1):
            outcomes = [1] * c + [0] * (n - c)
            chosen = [max(choice) for choice in itertools.combinations(outcomes, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ConfigError):
        pass_at_k(n, c, k)


def test_bootstrap_interval_by_hand() -> None:
    # Means of 10 fair coins: P(X <= 1) = 0.011 and P(X <= 2) = 0.055 bracket 2.5 %, so the interval is [0.2, 0.8].
    interval = bootstrap_interval([0.0] * 5 + [1.0] * 5, resamples=2000, seed=0)
    assert (interval.value, interval.low, interval.high) == (0.5, pytest.approx(0.2), pytest.approx(0.8))
    # Two prompts: resampled means are 0, 0.5, 1 with chances 1/4, 1/2, 1/4.
    interval = bootstrap_interval([0.0, 1.0], resamples=2000, seed=0)
    assert (interval.low, interval.high) == (0.0, 1.0)
    for constant in (0.0, 1.0):
        interval = bootstrap_interval([constant] * 7, resamples=100, seed=0)
        assert (interval.value, interval.low, interval.high) == (constant, constant, constant)


def test_bootstrap_interval_depends_on_the_seed_alone() -> None:
    values = [i / 10 for i in range(11)]
    first = bootstrap_interval(values, resamples=200, seed=1)
    assert first == bootstrap_interval(values, resamples=200, seed=1)
    assert first != bootstrap_interval(values, resamples=200, seed=2)
    assert first.low < first.value == 0.5 < first.high


# --- what is measured ------------------------------------------------------------------------------------------------


class Script:
    """An engine that answers each prompt with its next scripted text; a trailing `~` means cut off at the limit."""

    name = "script"

    def __init__(self, answers: dict[str, tuple[str, list[str]]]) -> None:
        self.tokenizer = tiny_tokenizer()
        self._answers = answers
        self.calls: list[tuple[list[Request], Sampling]] = []
        self.awake = False

    def wake(self) -> None:
        self.awake = True

    def sleep(self) -> None:
        self.awake = False

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        assert self.awake
        self.calls.append((list(requests), sampling))
        seen: dict[str, int] = {}
        completions = []
        for request in requests:
            prompt = self.tokenizer.decode(request.prompt_ids)
            greedy, samples = self._answers[prompt]
            text = greedy if sampling.temperature == 0 else samples[seen.get(prompt, 0)]
            seen[prompt] = seen.get(prompt, 0) + 1
            finish = Finish.LENGTH if text.endswith("~") else Finish.STOP
            ids = [*self.tokenizer(text.rstrip("~"))["input_ids"]] + ([2] if finish is Finish.STOP else [])
            completions.append(Completion(tuple(ids), (0.0,) * len(ids), finish))
        return completions


def judge(groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
    def verdict(group: Group, text: str) -> Verdict:
        if text == "?" or group.answer == "unusable":
            return Verdict.ABSTAIN
        return Verdict.RIGHT if text == group.answer else Verdict.WRONG

    return [verdict(*pair) for pair in zip(groups, texts, strict=True)]


SCRIPT = {
    "a": ("1", ["1", "x", "x~", "x"]),  # greedy right, 1 of 4 samples
    "b": ("y", ["2", "2", "2", "2"]),  # greedy wrong, 4 of 4
    "c": ("x~", ["x", "?", "x~", "x"]),  # never right, one abstention
}
TASKS = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": ["1", "2", "3"]})


def test_figures_by_hand() -> None:
    engine = Script(SCRIPT)
    result = evaluate(engine, engine.tokenizer, TASKS, judge, k=2, samples=4, max_new_tokens=9)
    assert result.pass_at_1.value == pytest.approx(1 / 3)
    assert result.avg_at_k.value == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert result.pass_at_k.value == pytest.approx((1 / 2 + 1 + 0) / 3)
    wilson_of = share_of_tasks([1 / 4, 1, 0], samples=4)
    assert (result.avg_at_k.low, result.avg_at_k.high) == (wilson_of.low, wilson_of.high)
    assert result.truncation_rate == pytest.approx(3 / 15)
    assert result.abstain_rate == pytest.approx(1 / 15)
    assert result.mean_tokens == pytest.approx((15 + 12) / 15)  # one byte each, and <|im_end|> on the 12 that stopped
    assert (result.n, result.skipped_long, result.skipped_unjudged) == (3, 0, 0)
    assert [(s.greedy_right, s.samples_right) for s in result.scores] == [(True, 1), (False, 4), (False, 0)]


@pytest.mark.parametrize(("answer", "share"), [("1", 1.0), ("9", 0.0)])
def test_all_right_and_all_wrong_are_not_certain(answer: str, share: float) -> None:
    engine = Script({"a": ("1", ["1", "1"]), "b": ("1", ["1", "1"])})
    tasks = datasets.Dataset.from_dict({"prompt": ["a", "b"], "answer": [answer] * 2})
    result = evaluate(engine, engine.tokenizer, tasks, judge, k=2)
    for interval in (result.pass_at_1, result.avg_at_k, result.pass_at_k):
        two = wilson(2 * share, 2)
        assert (interval.value, interval.low, interval.high) == (share, two.low, two.high)
        assert 0.6 < interval.high - interval.low < 0.7


def test_prompts_that_cannot_count_are_left_out_and_counted() -> None:
    engine = Script({"a": ("1", ["1", "x"]), "b": ("1", ["1", "1"])})
    tasks = datasets.Dataset.from_dict({"prompt": ["a", "b", "long" * 5], "answer": ["1", "unusable", "1"]})
    result = evaluate(engine, engine.tokenizer, tasks, judge, k=2, max_new_tokens=4, context_tokens=20)
    assert (result.n, result.skipped_long, result.skipped_unjudged) == (1, 1, 1)
    assert (result.avg_at_k.value, result.abstain_rate) == (0.5, 0.5)
    assert "1 prompts too long, 1 prompts without a usable reference" in result.conditions()


def test_engine_is_woken_seeded_and_put_to_sleep() -> None:
    engine = Script(SCRIPT)
    evaluate(engine, engine.tokenizer, TASKS, judge, k=4, temperature=0.7, max_new_tokens=9, seed=5)
    (greedy, cold), (sampled, warm) = engine.calls
    assert (cold.temperature, warm.temperature, warm.top_p, warm.top_k) == (0.0, 0.7, 1.0, 0)
    assert cold.max_new_tokens == warm.max_new_tokens == 9
    expected = [
        seed_for(5, step=0, prompt_hash=prompt_hash(prompt), index=i, purpose="eval")
        for prompt in "abc"
        for i in range(4)
    ]
    assert [request.seed for request in sampled] == expected
    assert len(set(expected)) == 12
    assert len(greedy) == 3
    assert not engine.awake
    with pytest.raises(KeyError):
        evaluate(Script({}), engine.tokenizer, TASKS, judge)
    broken = Script({})
    with pytest.raises(KeyError):
        evaluate(broken, engine.tokenizer, TASKS, judge)
    assert not broken.awake


def test_limit_takes_the_first_tasks() -> None:
    engine = Script(SCRIPT)
    result = evaluate(engine, engine.tokenizer, TASKS, judge, k=4, limit=2)
    assert [s.prompt_hash for s in result.scores] == [prompt_hash("a"), prompt_hash("b")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9, "samples": 8}, "k=9 with samples=8"),
        ({"k": 0}, "k=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    engine = Script(SCRIPT)
    with pytest.raises(ConfigError, match=message):
        evaluate(engine, engine.tokenizer, TASKS, judge, **options)
    assert engine.calls == []


def test_nothing_to_count_is_an_error() -> None:
    engine = Script(SCRIPT)
    unusable = datasets.Dataset.from_dict({"prompt": ["a"], "answer": ["unusable"]})
    with pytest.raises(DataError, match="abstained on every answer"):
        evaluate(engine, engine.tokenizer, unusable, judge, k=4)
    with pytest.raises(DataError, match="leaves room"):
        evaluate(engine, engine.tokenizer, TASKS, judge, max_new_tokens=64, context_tokens=64)


def test_json_and_table_carry_the_figures() -> None:
    engine = Script(SCRIPT)
    result = evaluate(engine, engine.tokenizer, TASKS, judge, k=2, samples=4, seed=3)
    assert EvalResult.from_json(result.to_json()) == result
    values = json.loads(result.to_json())
    assert (values["seed"], values["temperature"], values["n"], values["k"]) == (3, 0.6, 3, 2)
    older = json.dumps(values | {"bootstrap": 2000})
    assert EvalResult.from_json(older) == result, "a file of an older version"
    with pytest.raises(DataError, match="evaluate again"):
        EvalResult.from_json('{"k": 1}')
    console = Console(width=110, record=True, file=open("/dev/null", "w"))
    console.print(result.as_table())
    text = console.export_text()
    for figure in (
        "33.3%",
        "41.7%",
        "50.0%",
        "Pass@1 (greedy)",
        "Avg@2",
        "Pass@2",
        "20.0%",
        "6.7%",
        "seed 3",
        "3 prompts",
    ):
        assert figure in text


# --- with a real model -----------------------------------------------------------------------------------------------


def parity(groups: Sequence[Group], texts: Sequence[str]) -> list[Verdict]:
    return [Verdict.RIGHT if len(text.encode()) % 2 else Verdict.WRONG for text in texts]


def test_a_prompts_score_does_not_depend_on_the_other_prompts(tmp_path: Path) -> None:
    spec = ModelSpec(str(save_tiny(tmp_path)))
    model, tokenizer = load_base(spec), load_tokenizer(spec)
    tasks = datasets.Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"{i} + {i} * {'9' * i}"}] for i in range(6)]}
    )

    def run(tasks: datasets.Dataset, concurrent: int, seed: int = 1) -> EvalResult:
        engine = HFEngine(
            model, eos_ids=eos_ids(model, tokenizer), pad_id=tokenizer.pad_token_id, max_concurrent=concurrent
        )
        return evaluate(engine, tokenizer, tasks, parity, k=4, max_new_tokens=8, seed=seed, temperature=1.0)

    whole = run(tasks, 64)
    assert run(tasks, 64) == whole
    assert run(tasks.select(range(3)), 2).scores == whole.scores[:3]
    assert run(tasks, 64, seed=2).scores != whole.scores
    assert 0 < whole.avg_at_k.value < 1


def test_evaluate_model_from_files(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": str(i)}) + "\n" for i in range(3)))
    result = evaluate_model(ModelSpec(str(base)), None, str(file), verifier="exact", k=2, max_new_tokens=4, limit=2)
    assert (result.n, result.pass_at_1.value, result.max_new_tokens) == (2, 0.0, 4)
    assert context_length(load_base(ModelSpec(str(base)))) == 512
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate_model(None, None, str(file))


def test_a_conversation_the_template_rejects_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    template = "{{ raise_exception('no tools') if messages|length > 1 else messages[0].content }}"
    (base / "chat_template.jinja").write_text(template)
    (base / "model.safetensors").unlink()
    user = {"role": "user", "content": "x"}
    rows = [{"prompt": [user] * turns, "answer": "1"} for turns in (1, 1, 2)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    with pytest.raises(ModelError, match=r"^t.json, row 3, column 'prompt': .* no tools"):
        evaluate_model(ModelSpec(str(base)), None, str(tmp_path / "t.json"), k=1)


def test_an_adapter_is_evaluated_on_the_prompts_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own chat template, the data options of `train`, and variables of the template."""
    spec = ModelSpec(str(save_tiny(tmp_path / "base")))
    adapter = make_adapter(spec, tmp_path / "adapter")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n'", "assistant\n' + (mode or 'none') + '>'")
    tokenizer.save_pretrained(adapter)
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"query": "2+2?", "target": 4}))
    asked: list[str] = []
    generate = HFEngine.generate

    def spy(engine: HFEngine, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        asked.extend(tokenizer.decode(request.prompt_ids) for request in requests)
        return generate(engine, requests, sampling)

    monkeypatch.setattr(HFEngine, "generate", spy)
    result = evaluate_model(
        None,
        adapter,
        str(file),
        verifier="numeric",
        prompt_column="query",
        answer_column="target",
        system_prompt="Be brief.",
        chat_template_kwargs={"mode": "fast"},
        k=1,
        max_new_tokens=2,
    )
    system, user = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>user\n2+2?<|im_end|>\n"
    assert result.n == 1 and asked == [f"{system}{user}<|im_start|>assistant\nfast>"] * 2
    evaluate_model(
        None, adapter, str(file), verifier="numeric", prompt_column="query", answer_column="target",
        conversational=False, k=1, max_new_tokens=2,
    )  # fmt: skip
    assert asked[2:] == ["2+2?"] * 2
