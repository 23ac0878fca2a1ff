"""Verdicts on labeled answers, and the return values of custom verifiers."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from answer_forms import FORMS
from answer_pairs import ATTACKS, PAIRS
from cpu_limit import cpu_limit
from mel_lite.errors import VerifierError
from mel_lite.types import Verdict
from mel_lite.verify.verifiers import BUILT_IN, MAX_ANSWER_CHARS, get_verifier
from reported_answers import REPORTED, columns_of


@pytest.mark.parametrize(("verifier", "completion", "answer", "verdict"), PAIRS)
def test_labeled_pairs(verifier: str, completion: str, answer: str, verdict: str) -> None:
    assert get_verifier(verifier)(completion, answer) == verdict


@pytest.mark.parametrize(("verifier", "completion", "answer", "verdict"), REPORTED)
def test_answers_of_public_reports(verifier: str, completion: str, answer: str, verdict: str) -> None:
    if verifier == "reasoning-gym":
        pytest.importorskip("reasoning_gym")
    assert get_verifier(verifier)(completion, answer, **columns_of(verifier, answer)) == verdict


@pytest.mark.parametrize(("verifier", "completion", "answer", "verdict"), FORMS)
def test_forms_of_answers(verifier: str, completion: str, answer: str, verdict: str) -> None:
    assert get_verifier(verifier)(completion, answer) == verdict


def test_enough_pairs_of_every_kind() -> None:
    assert len(PAIRS) >= 60 and len(ATTACKS) >= 15
    assert {(name, verdict) for name, _, _, verdict in PAIRS} == {
        (name, verdict) for name in BUILT_IN if name != "reasoning-gym" for verdict in ("right", "wrong", "abstain")
    }


def test_gold_and_answer_are_not_interchangeable() -> None:
    math = get_verifier("math")
    assert math(r"\boxed{2x+3=1}", "1") is Verdict.RIGHT  # the question asks for the right-hand side
    assert math(r"\boxed{1}", "2x+3=1") is Verdict.WRONG  # the question asks for the equation


@pytest.mark.parametrize("name", ["numeric", "exact", "multiple-choice"])
def test_text_verifiers_are_fast_on_long_texts(name: str) -> None:
    verifier = get_verifier(name)
    gold = {"numeric": "42", "exact": "forty-two", "multiple-choice": "D"}[name]
    texts = [completion for attack, completion, _, _ in ATTACKS if len(completion) > 9_000]
    texts += [
        "answer is " * 30_000,
        "<answer>" * 30_000,
        "\\" * 300_000,  # above what the pool passes on
        "1/" * 150_000,
        "A " * 150_000,
        "{" * 300_000,
        "<B>\n" * 75_000,
    ]
    for text in texts:
        with cpu_limit(4):
            assert verifier(text, gold) is Verdict.WRONG, text[:30]


def test_math_rejects_a_final_answer_that_is_too_long() -> None:
    math = get_verifier("math")
    assert math(r"\boxed{" + "so " * 100 + "$42$}", "42") is Verdict.RIGHT
    assert math(r"\boxed{" + "so " * MAX_ANSWER_CHARS + "$42$}", "42") is Verdict.WRONG


# ---- verifiers by name ----


def write_module(folder: Path, source: str) -> None:
    (folder / "my_rules.py").write_text(textwrap.dedent(source))


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Working folder whose modules can be imported. They are removed from `sys.modules` after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    yield tmp_path
    sys.modules.pop("my_rules", None)


def test_an_unknown_name_suggests_the_nearest(rules: Path) -> None:
    with pytest.raises(VerifierError, match=r"'nummeric' is not known. Did you mean 'numeric'\?"):
        get_verifier("nummeric")


def test_dotted_path_from_the_current_folder(rules: Path) -> None:
    write_module(rules, "def same(completion, answer):\n    return completion == answer\n")
    for name in ("my_rules:same", "my_rules.same"):
        verifier = get_verifier(name)
        assert [verifier("a", "a"), verifier("a", "b", level=3)] == ["right", "wrong"]
    assert str(rules) not in sys.path


def test_broken_dotted_paths(rules: Path) -> None:
    write_module(rules, "def same(completion, answer): ...\ndef lonely(completion): ...\nnumber = 3\n")
    for name, message in (
        ("my_rules:sane", "has no 'sane'. Did you mean 'same'"),
        ("my_rule:same", "importing 'my_rule' failed with ModuleNotFoundError"),
        ("my_rules:number", "is a int, not a function"),
        ("my_rules:lonely", "must take two arguments"),
    ):
        with pytest.raises(VerifierError, match=message):
            get_verifier(name)


def test_return_values_become_verdicts_or_errors(rules: Path) -> None:
    write_module(rules, "def echo(completion, answer, result):\n    return result\n")
    verifier = get_verifier("my_rules:echo")
    given = [True, False, np.True_, np.False_, Verdict.ABSTAIN, "right", "wrong", "abstain"]
    assert [str(verifier("", "", result=result)) for result in given] == (
        ["right", "wrong", "right", "wrong", "abstain", "right", "wrong", "abstain"]
    )
    for result in ("correct", [True], {"score": 1}, 1.0, 0.0, float("nan"), 1, None, np.float32(1)):
        with pytest.raises(VerifierError, match=f"'my_rules:echo' returned {type(result).__name__}") as error:
            verifier("", "", result=result)
        assert repr(result) in str(error.value)


def test_a_function_is_a_verifier_by_itself() -> None:
    def same(completion: str, answer: str, level: int = 0) -> bool:
        return completion == answer and level == 3

    class Rule:
        def __call__(self, text: str, gold: str) -> str:
            return "right" if text == gold else "wrong"

    verifier = get_verifier(same)
    assert verifier.name.endswith(":test_a_function_is_a_verifier_by_itself.<locals>.same")
    assert verifier.columns == frozenset({"level"})
    assert [str(verifier("a", "a", level=3)), str(verifier("a", "a", level=2))] == ["right", "wrong"]
    assert [str(get_verifier(Rule())(text, "a")) for text in "ab"] == ["right", "wrong"]
    assert get_verifier(BUILT_IN["numeric"]).name == "numeric"
    with pytest.raises(VerifierError, match=r"verifier = 3 is a int. Set a name"):
        get_verifier(3)  # type: ignore[arg-type]
    with pytest.raises(VerifierError, match="must take two arguments"):
        get_verifier(lambda completion: True)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "reasoning-gym"])
def test_built_in_verifiers_read_the_part_after_the_configured_tags(name: str) -> None:
    right, wrong = {"exact": ("Paris", "London"), "multiple-choice": ("B", "C")}.get(name, ("7", "5"))
    text = f"<plan>Answer: {wrong}</plan> Answer: {right}"
    own = get_verifier(name, think_tags=(("<plan>", "</plan>"),))
    assert [str(own(text, right)), str(own(text, wrong))] == ["right", "wrong"]
    assert own(f"<plan>Answer: {right}", right) is Verdict.WRONG
    assert get_verifier(name)(f"<plan>Answer: {right}", right) is Verdict.RIGHT  # not one of the usual tags
    whole = get_verifier(name, think_tags=())
    assert whole(f"<think>Answer: {right}", right) is Verdict.RIGHT


def test_your_own_verifier_gets_the_thoughts_too() -> None:
    assert get_verifier(lambda completion, answer: completion == answer)("<think>a</think>b", "<think>a</think>b")


def test_columns_go_only_to_verifiers_that_take_them(rules: Path) -> None:
    write_module(
        rules,
        """
        def one(completion, answer, level): return level == 3
        def rest(completion, answer, **columns): return columns == {"level": 3, "name": "n"}
        def swapped(answer, completion): return (answer, completion) == ("gold", "text")
        def other_names(text, gold, level=None): return (text, gold, level) == ("text", "gold", 3)
        """,
    )
    for name in ("one", "rest", "swapped", "other_names"):
        verifier = get_verifier(f"my_rules:{name}")
        assert verifier("text", "gold", level=3, name="n", completion="not me") is Verdict.RIGHT, name
    assert get_verifier("my_rules:one").columns == frozenset({"level"})
    assert get_verifier("my_rules:rest").columns is None
    assert get_verifier("my_rules:swapped").columns == frozenset()


def test_loading_a_verifier_imports_nothing_heavy() -> None:
    loaded = "print(*{'torch', 'sympy', 'datasets'} & {*sys.modules})"
    code = f"import sys, mel_lite.verify.pool, mel_lite.verify.verifiers; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
