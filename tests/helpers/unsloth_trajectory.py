"""`python unsloth_trajectory.py ORDER FOLDER`: a short MEL run. ORDER says when unsloth is imported and patches.

Prints the final state as JSON. With UNSLOTH_ALLOW_CPU=1, the import takes its GPU path; the last patches, which it
omits on such a machine, are applied here.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def patch() -> None:
    """Patch TRL's and transformers' trainers like `import unsloth` and loading a model do on a GPU."""
    unsloth: Any = importlib.import_module("unsloth")
    rl: Any = importlib.import_module("unsloth.models.rl")
    from transformers import Trainer

    rl.PatchRL(unsloth.FastLanguageModel)
    rl._patch_trl_rl_trainers("grpo_trainer")
    importlib.import_module("unsloth.models._utils").patch_gradient_accumulation_fix(Trainer)


def main(order: str, folder: Path) -> dict[str, str]:
    if order == "unsloth first":
        patch()
    import mel_lite.trainer

    assert mel_lite.trainer.GRPOTrainer.__name__ == "GRPOTrainer"
    if order == "unsloth second":
        patch()
    from transformers import Trainer

    from trainers import assert_learned, build, run_state

    folder.mkdir()
    trainer = build(
        folder, gradient_accumulation_steps=2, per_device_train_batch_size=4, max_steps=2, gradient_checkpointing=True
    )
    trainer.train()
    assert_learned(trainer)
    return {"trainer": Trainer.training_step.__module__, **run_state(trainer)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
