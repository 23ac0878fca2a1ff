"""The order of the training prompts: TRL's, and the same for a run that resumes in a later epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from mel_lite import MELConfig, MELTrainer
from trainers import even_ids, sums, tiny_model


def epochs(trainer: Any, numbers: range) -> list[list[str]]:
    """The questions of each epoch in the order of the data loader."""
    loader = trainer.get_train_dataloader()
    seen = []
    for epoch in numbers:
        loader.set_epoch(epoch)
        seen.append([row["prompt"][0]["content"] for batch in loader for row in batch])
    return seen


@pytest.mark.parametrize("options", [{}, {"shuffle_dataset": False}, {"num_iterations": 2}])
def test_rows_come_in_the_order_of_trl(tmp_path: Path, options: dict[str, Any]) -> None:
    order = {}
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (MELTrainer, MELConfig)):
        model = tiny_model(tmp_path / "base")
        model.config.max_position_embeddings = 8192
        args = config_class(
            str(tmp_path / "run"), use_cpu=True, bf16=False, num_generations=4, per_device_train_batch_size=8,
            report_to="none", seed=7, **options,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        trainer = trainer_class(
            model, reward_funcs=even_ids, args=args, train_dataset=sums(7), processing_class=tokenizer
        )
        order[trainer_class] = epochs(trainer, range(3))
        if trainer_class is MELTrainer:
            assert epochs(trainer, range(2, 3)) == order[MELTrainer][2:], "an epoch does not depend on earlier ones"
    assert order[GRPOTrainer] == order[MELTrainer]
    assert len({question for question in order[MELTrainer][0]}) == 6
