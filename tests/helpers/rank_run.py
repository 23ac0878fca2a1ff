"""One process of a run on several: `python rank_run.py FOLDER '{"option": value, ...}'`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from mel_lite.lessons.internalise import LessonShare
from trainers import build, trainable


class DieAfter(TrainerCallback):
    """Exits this process immediately after the given step, as if the kernel had killed it."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == self._step:  # type: ignore[attr-defined]
            os._exit(9)


def main(folder: Path, options: dict[str, object], *, last: bool = True) -> None:
    """Run one trainer. `last`: leave the process group, which another run of this process would need."""
    rank = os.environ.get("RANK", "0")
    resume = options.pop("resume", None)
    dies = options.pop("dies_after", None)
    callbacks = [DieAfter(int(str(dies)))] if dies is not None and rank == "1" else []
    trainer = build(folder, callbacks=callbacks, **options)
    carried: list[int] = []
    prepare = trainer._prepare_inputs

    def spy(batch: object) -> object:
        inputs = prepare(batch)
        carried.append(len(inputs.get("lessons", LessonShare()).lessons))
        return inputs

    trainer._prepare_inputs = spy
    before = trainable(trainer)
    trainer.train(resume_from_checkpoint=resume)
    weights = {name: tensor.contiguous() for name, tensor in trainable(trainer).items()}
    assert any(not torch.equal(weights[name], tensor) for name, tensor in before.items()), "nothing was learned"
    save_file(weights, folder / f"weights-{rank}.safetensors")
    (folder / f"carried-{rank}.json").write_text(json.dumps(carried))
    calls = [len(requests) for requests, _ in getattr(trainer.engine.unmetered, "calls", [])]
    (folder / f"calls-{rank}.json").write_text(json.dumps(calls))
    if trainer.bank is not None:
        (folder / f"bank-{rank}.json").write_text(json.dumps(trainer.bank.state_dict()["lesson_bank"]))
    if last:
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
