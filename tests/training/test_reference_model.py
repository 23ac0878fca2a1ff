"""The KL penalty against a reference model, which TRL wraps in autocast before the scoring head is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_models import save_tiny
from trainers import build, even_ids


@pytest.mark.parametrize("bf16", [True, False])
def test_a_fully_trained_model_leaves_its_reference(tmp_path: Path, bf16: bool) -> None:
    save_tiny(tmp_path / "base")
    trainer = build(
        tmp_path,
        algorithm="grpo",
        beta=0.1,
        lora=False,
        bf16=bf16,
        reward_funcs=even_ids,
        verifier=None,
        max_steps=3,
        learning_rate=1e-3,
    )
    trainer.train()
    kls = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert len(kls) == 3 and kls[0] == pytest.approx(0, abs=1e-6) and kls[-1] > 1e-4
