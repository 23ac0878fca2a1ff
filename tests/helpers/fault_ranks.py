"""One process of a run in tests/faults/test_several_processes.py: `python fault_ranks.py FOLDER FAULT`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mel_lite.errors import DivergedError
from trainers import assert_learned, build, trainable


def main(folder: Path, fault: str) -> int:
    rank = int(os.environ["RANK"])
    trainer = build(folder, max_steps=4, per_device_train_batch_size=4, save_strategy="steps", save_steps=4)
    original = trainer._compute_loss

    def compute_loss(model: Any, inputs: Any) -> Any:
        loss = original(model, inputs)
        step = trainer.state.global_step
        if fault == "nan on one" and rank == 1 and step == 1:
            return loss * float("nan")
        if fault == "nan three times" and rank == 1 and step >= 1:
            return loss + float("nan")
        if fault == "signal to one" and rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    trainer._compute_loss = compute_loss
    code = 0
    try:
        trainer.train()
    except DivergedError as error:
        code = error.exit_code
    except SystemExit as error:
        code = int(error.code or 0)
    save_file({n: w.contiguous() for n, w in trainable(trainer).items()}, folder / f"weights-{rank}.safetensors")
    (folder / f"end-{rank}.txt").write_text(f"{code} {trainer.state.global_step} {trainer.nonfinite.skipped_steps}")
    assert_learned(trainer)
    trainer.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
