"""TRL's tests run on both classes, with stand-ins for the Hub's models and texts. Miniature suites stand for TRL's."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import torch
import pytest
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

class TestGRPOTrainer:
    def test_train(self, tmp_path):
        rows = load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train")
        args = GRPOConfig(str(tmp_path), per_device_train_batch_size=3, num_generations=3, max_completion_length=4,
                          max_steps=2, report_to="none", bf16=False, use_cpu=True, learning_rate=0.1)
        trainer = GRPOTrainer("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
                              "trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5", args, rows)
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
        assert trainer.state.global_step == 2
        for name, weight in trainer.model.named_parameters():
            assert not torch.equal(before[name], weight), name

    def test_name(self):
        assert GRPOTrainer.__name__ == "GRPOTrainer"

    def test_absent(self):
        load_dataset("trl-internal-testing/no-such-dataset")

    @pytest.mark.skip(reason="never")
    def test_skipped(self):
        pass

class TestGRPOTrainerVLM:
    def test_left_out(self):
        assert False
"""


@pytest.fixture(scope="module")
def suite() -> Iterator[Any]:
    """benchmarks/peer_suite/suite.py, imported as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("peer_suite.suite")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "peer_suite", *map(str, arguments)]
    paths = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=environment)


@pytest.mark.slow
def test_both_classes_are_compared(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "test_grpo_trainer.py").write_text(SUITE)
    (tmp_path / "VERSION").write_text("9.9.dev0\n")
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("raise ImportError('the checkout, not the installed package')")
    done = run(tmp_path, "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    counts = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if "Trainer  " in line}
    assert counts == {"GRPOTrainer": ["2", "1", "1"], "MELTrainer": ["1", "2", "1"]}, done.stdout
    assert "passes with GRPOTrainer alone: 1\n  TestGRPOTrainer::test_name\n      AssertionError" in done.stdout
    assert "passes with MELTrainer alone: 0" in done.stdout
    assert "fails with both: 1\n  TestGRPOTrainer::test_absent\n      FileNotFoundError: trl-int" in done.stdout
    assert "skipped: 1\n  1 x never" in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["conditions"]["tests of TRL"] == "9.9.dev0"
    assert record["outcomes"]["MELTrainer"]["TestGRPOTrainer::test_train"] == ["passed", ""]


def test_a_folder_without_the_suite_is_refused(suite: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has no tests/test_grpo_trainer.py. .*give a checkout.*git clone"):
        suite.copy_tests(tmp_path, tmp_path / "copy")


def test_reasons_hold_no_paths_and_one_line(suite: Any, tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.test_grpo_trainer.TestX" name="test_a[x/y]"/>'
        '<testcase classname="tests.test_grpo_trainer.TestX" name="test_b">'
        '<failure message="OSError: /tmp/abc/def/model.py is\n gone">long</failure></testcase>'
        '<testcase classname="tests.test_grpo_trainer.TestX" name="test_c"><error message="E"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = suite.outcomes(tmp_path / "report.xml")
    assert found == {
        "TestX::test_a[x/y]": ("passed", ""),
        "TestX::test_b": ("failed", "OSError: model.py is gone"),
        "TestX::test_c": ("failed", "E"),
    }
    assert suite.counts(found) == {"passed": 1, "failed": 2, "skipped": 0}
    assert suite.only_passed(found, {"TestX::test_a[x/y]": ("failed", "why"), "TestX::test_b": ("passed", "")}) == {
        "TestX::test_a[x/y]": "why"
    }


@pytest.mark.slow
def test_the_large_tokenizer_writes_the_ids_that_the_suite_holds(suite: Any) -> None:
    stand_ins = importlib.import_module("peer_suite.stand_ins")
    tokenizer = stand_ins.tokenizer_for("qwen3")
    call = [151657, 198, 4913, 606, 788, 330, 64648, 22785, 497, 330, 16370, 788, 5212, 64, 788, 220, 18, 11248, 151658]
    text = '<tool_call>\n{"name": "multiply_tool", "arguments": {"a": 3}}\n</tool_call>'
    assert tokenizer.decode(call) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (151645, 151643, 151936)
