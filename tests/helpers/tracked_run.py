"""Train two steps with a tracker, and send an evaluation: `python tracked_run.py FOLDER TRACKER`."""

from __future__ import annotations

import sys
from pathlib import Path

from mel_lite.resilience.tracker_tables import send_evaluation
from run_folders import evaluation
from trainers import build


def main(folder: Path, tracker: str) -> None:
    """Train, and wait until the tracker has everything."""
    trainer = build(
        folder, max_steps=2, report_to=tracker, log_completions=True, run_name="mine", num_completions_to_print=0
    )
    trainer.train()
    send_evaluation(trainer, evaluation([1, 2, 4]))
    for callback in trainer.callback_handler.callbacks:
        if tracker == "trackio" and hasattr(callback, "tracker"):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
        if tracker == "tensorboard" and getattr(callback, "tb_writer", None) is not None:
            callback.tracker.post(callback.tb_writer.close)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
