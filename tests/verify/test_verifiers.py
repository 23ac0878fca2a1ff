"""Verdicts on labelled answers, answer extraction, and the return values of custom verifiers."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from answer_pairs import ATTACKS, PAIRS
from cpu_limit import cpu_limit
from mel_lite.errors import VerifierError
from mel_lite.types import Verdict
from mel_lite.verify import extract, gym
from mel_lite.verify.extract import extract_answer
from mel_lite.verify.verifiers import BUILT_IN, MAX_ANSWER_CHARS, get_verifier


@pytest.mark.parametrize(("verifier", "completion", "answer", "verdict"), PAIRS)
def test_labelled_pairs(verifier: str, completion: str, answer: str, verdict: str) -> None:
    assert get_verifier(verifier)(completion, answer) == verdict


def test_enough_pairs_of_every_kind() -> None:
    assert len(PAIRS) >= 60 and len(ATTACKS) >= 15
    assert {(name, verdict) for name, _, _, verdict in PAIRS} == {
        (name, verdict) for name in BUILT_IN if name != "reasoning-gym" for verdict in ("right", "wrong", "abstain")
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"\boxed{} nothing", None),
        ("so #### 72\n", None),
        ("so\n#### 72\n", "72"),
        ("#### -1,000 apples", "-1,000 apples"),
        ("#### Step 3: compute\n4", None),
        ("#### 3. Compute\n4", None),
        ("Answer: 5\nThat is all.", "5"),
        ("**Answer:** 42", "42"),
        ("**Final Answer**\nAnswer:\n\n12", "12"),
        ("The final answer is $4$", "$4$"),
        ("<answer>1</answer> wait <answer> 2 </answer>", "2"),
        ("<answer>1</answer> then <answer>2", "1"),
        (r"<answer>Answer: \boxed{3}</answer>", "3"),
        ("Answer: 3\n" + r"so \boxed{4}", "4"),
        (r"\boxed{4}" + "\nAnswer: 3", "3"),
        ("the answer is 7", "7"),
        (r"\boxed{4}, and the answer is always positive", "4"),
        ("no marker: 4", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "value", "percent"),
    [
        ("$1,234.50", "2469/2", False),
        ("-$5", "-5", False),
        ("$-5", "-5", False),
        ("12%", "12", True),
        (r"12 \%", "12", True),
        (r"-\frac{1}{2}", "-1/2", False),
        (r"3\frac12", "7/2", False),
        ("2 3/4 cups", "11/4", False),
        ("1.5e3", "1500", False),
        (r"1.5\times 10^{-1}", "3/20", False),
        ("\uff14\uff12", "42", False),
        ("12{,}345", "12345", False),
        ("x = 3 = 3.0", "3", False),
    ],
)
def test_numbers_are_read_exactly(text: str, value: str, percent: bool) -> None:
    number = extract.sole_number(text)
    assert number is not None
    assert (str(number.value), number.percent) == (value, percent)


@pytest.mark.parametrize(
    "text",
    ["3 or 4", "3, 4", "(1, 2)", "3^2", r"3\pi", r"\sqrt{4}", "<5", "5x", "1e9999", "9" * 500, "2+3", "no", "1/0"],
)
def test_texts_that_are_not_a_single_number(text: str) -> None:
    assert extract.sole_number(text) is None


def test_gold_and_answer_are_not_interchangeable() -> None:
    math = get_verifier("math")
    assert math(r"\boxed{2x+3=1}", "1") is Verdict.RIGHT  # the question asks for the right-hand side
    assert math(r"\boxed{1}", "2x+3=1") is Verdict.WRONG  # the question asks for the equation


@pytest.mark.parametrize("name", ["numeric", "exact", "multiple-choice"])
def test_text_verifiers_are_fast_on_a_megabyte(name: str) -> None:
    verifier = get_verifier(name)
    gold = {"numeric": "42", "exact": "forty-two", "multiple-choice": "D"}[name]
    texts = [completion for attack, completion, _, _ in ATTACKS if len(completion) > 9_000]
    texts += [
        "answer is " * 100_000,
        "<answer>" * 100_000,
        "\\" * 1_000_000,
        "1/" * 500_000,
        "A " * 500_000,
        "{" * 1_000_000,
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
    given = [True, False, 1, 0.99, 0.98, 0.0, float("nan"), None, Verdict.ABSTAIN, "right", "wrong"]
    assert [str(verifier("", "", result=result)) for result in given] == (
        ["right", "wrong", "right", "right", "wrong", "wrong", "abstain", "abstain", "abstain", "right", "wrong"]
    )
    for result in ("correct", [True], {"score": 1}):
        with pytest.raises(VerifierError, match=f"'my_rules:echo' returned {type(result).__name__}"):
            verifier("", "", result=result)


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


# ---- reasoning-gym ----


def gym_entry(task: str, answer: str, **metadata: object) -> str:
    return json.dumps({"question": "?", "answer": answer, "metadata": {"source_dataset": task, **metadata}})


def test_reasoning_gym_uses_the_scorer_of_the_task() -> None:
    pytest.importorskip("reasoning_gym")
    verifier = get_verifier("reasoning-gym")
    assert verifier("<answer>3</answer>", "3", gym_entry=gym_entry("gcd", "3")) is Verdict.RIGHT
    assert verifier("It is 3", "3", gym_entry=gym_entry("gcd", "3")) is Verdict.WRONG  # partial credit
    entry = gym_entry("countdown", "4*(3+2)", numbers=[2, 3, 4], target=20)
    assert verifier("Answer: (2+3)*4", "4*(3+2)", gym_entry=entry) is Verdict.RIGHT
    assert verifier("Answer: 2+3*4", "4*(3+2)", gym_entry=entry) is Verdict.WRONG


@pytest.mark.parametrize("task", sorted(gym._EVALUATED | gym._PARSED))
def test_reasoning_gym_never_evaluates_the_answer(task: str, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    canary = tmp_path / "canary"
    entry = gym_entry(task, "x", numbers=[1], target=1, valid_answers=["x"], variable="x", integrand="1")
    for attack in (
        f"open({str(canary)!r}, 'w')",
        f"__import__('pathlib').Path({str(canary)!r}).touch()",
        "().__class__",
    ):
        assert gym.score(attack, entry) == 0.0
    assert not canary.exists()
    if task in gym._EVALUATED:
        assert gym.score("x", entry) == 1.0


def test_reasoning_gym_errors_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerifierError, match="column 'gym_entry' = 'nonsense' is not a reasoning-gym entry"):
        gym.score("1", "nonsense")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(VerifierError, match=r'pip install "mel-lite\[gym\]"'):
        get_verifier("reasoning-gym")
