"""What a run needs from outside, checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from command_line import mel_lite_command
from mel_lite.errors import ModelError
from mel_lite.models.load import ModelSpec, check_weights
from task_files import write
from tiny_models import save_tiny


def test_a_base_without_weights_is_found_out_early(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    check_weights(ModelSpec(str(base)))
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights here"):
        check_weights(ModelSpec(str(base)))


@pytest.mark.slow
def test_one_command_starts_and_resumes(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    tasks = write(tmp_path / "t.jsonl", [{"prompt": f"{i}+2?", "answer": str(i + 2)} for i in range(8)])
    command = (
        "train", "--gpu", "cpu", "--model", base, "--dataset", tasks, "--algorithm", "grpo", "--output-dir",
        tmp_path / "run", "--auto-resume", "--set", "train.max_completion_length=8", "--set", "export.format=null",
        "--set", "train.save_strategy=steps", "--set", "train.save_steps=1", "--set", f"data.eval={tasks}",
    )  # fmt: skip
    first = mel_lite_command(*command, "--max-steps", 1)
    assert first.returncode == 0, first.stderr
    assert "1/1" in first.stdout
    second = mel_lite_command(*command, "--max-steps", 2)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    for card in (tmp_path / "run" / "README.md", tmp_path / "run" / "adapter" / "README.md"):
        text = card.read_text()
        assert ModelCard(text).data.eval_results is not None and "| learning rate |" in text
        assert str(tmp_path) not in text and "`base`" in text and "- trl: " in text
    again = mel_lite_command(*command, "--max-steps", 2)
    assert again.returncode == 0, again.stderr
    assert "before" in again.stdout
    assert "2/2" not in again.stdout
    bare = mel_lite_command("train", "--gpu", "cpu", "--auto-resume")
    assert bare.returncode == 2
    assert "--output-dir" in bare.stderr
