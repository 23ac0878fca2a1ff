"""TRL's tests run on both classes, with stand-ins for the Hub's models and texts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import pytest
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

class TestGRPOTrainer:
    @pytest.mark.parametrize("model", ["Qwen2ForCausalLM-2.5", "Qwen3MoeForCausalLM"])
    def test_train(self, tmp_path, model):
        rows = load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train")
        args = GRPOConfig(str(tmp_path), per_device_train_batch_size=3, num_generations=3, max_completion_length=4,
                          max_steps=1, report_to="none", bf16=False, use_cpu=True)
        trainer = GRPOTrainer(f"trl-internal-testing/tiny-{model}", lambda completions, **_: [float(len(c)) for c in
                              completions], args, rows)
        trainer.train()
        assert trainer.state.global_step == 1

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


@pytest.mark.slow
def test_both_classes_are_compared(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    (tmp_path / "tests" / "test_grpo_trainer.py").write_text(SUITE)
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("raise ImportError('the checkout, not the installed package')")
    command = [sys.executable, str(ROOT / "benchmarks" / "peer_suite.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    counts = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("trl", "mel"))}
    assert counts == {"trl": ["3", "1", "1"], "mel-lite": ["2", "2", "1"]}, done.stdout
    assert "passes with TRL's class alone: 1\n  TestGRPOTrainer::test_name\n      AssertionError" in done.stdout
    assert "passes with MELTrainer alone: 0" in done.stdout
    assert "fails with both: 1\n  1 x FileNotFoundError: trl-internal-testing/no-such-dataset is not" in done.stdout


def test_a_folder_without_the_suite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    suite = importlib.import_module("peer_suite")
    with pytest.raises(SystemExit, match="has no tests/test_grpo_trainer.py. Give a checkout of TRL"):
        suite.copy_tests(tmp_path, tmp_path / "copy")
