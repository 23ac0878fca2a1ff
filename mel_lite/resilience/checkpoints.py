"""How the trainer saves and resumes: TRL's checkpoint, built in staging, committed whole, taken back exactly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from mel_lite.errors import CheckpointError
from mel_lite.models.adapters import RECORD, check_base, write_fingerprint
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.resume_checks import check_inputs, inputs
from mel_lite.resilience.state_files import usable
from mel_lite.training.metrics import truncate_metrics


class AtomicCheckpoints:
    """Mixin over a TRL trainer with `_open_store()`, `_engine` and the micro-step counter `_step`."""

    args: Any
    state: Any
    accelerator: Any
    model: Any
    _step: int
    _engine: Any
    _tripwires: Any
    funnel_totals: Counter[str]
    """Funnel counts summed over the run."""
    _staging: Path | None = None
    """Where a save that is under way puts its files; None outside of one."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *, allow_change: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        """As TRL's. Resuming verifies the checkpoint first and takes the store and metrics back to its step.

        A run whose last step was saved is loaded and left as it is. `allow_change` names inputs that need not be those
        of the checkpoint: dataset, templates, chat_template, dtype, batch.

        Raises: CheckpointError when there is nothing whole to resume from, ModelError when it belongs to another base
            model, ConfigError when it was made from other inputs.
        """
        if not resume_from_checkpoint:
            return super().train(**kwargs)  # type: ignore[misc]
        path = self._resolve(resume_from_checkpoint)
        with usable(path / "trainer_state.json"):
            saved = TrainerState.load_from_json(str(path / "trainer_state.json"))
            done = int(saved.global_step)
            int(saved.train_batch_size), float(saved.epoch)  # what transformers counts with; never missing in a save
        with usable(path / checkpoint_files.STATE):
            self._take_back(path, allow_change)
        if 0 < self.args.max_steps <= done:
            # transformers would take one more step before it looks at max_steps.
            self._load_from_checkpoint(str(path))  # type: ignore[attr-defined]
            self.state = saved
            return TrainOutput(done, 0.0, {})
        return super().train(resume_from_checkpoint=str(path), **kwargs)  # type: ignore[misc]

    @cached_property
    def _inputs(self) -> dict[str, str]:
        return inputs(self)

    def _resolve(self, wanted: str | bool) -> Path:
        """Choose the checkpoint on one process (a damaged one is renamed there) and tell the others."""
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = str(checkpoint_files.resolve(Path(self.args.output_dir), wanted))
            except CheckpointError as error:
                answer[1] = str(error)
        path, problem = broadcast_object_list(answer, from_process=0)
        if problem:
            raise CheckpointError(problem)
        return Path(path)

    def _take_back(self, path: Path, allow_change: Sequence[str]) -> None:
        """Put counters, store and metrics where they stood when `path` was saved; what came later is redone."""
        if (path / RECORD).is_file():
            check_base(self.model, path)
        state = checkpoint_files.read_state(path)
        if not state:
            return
        check_inputs(state.get("inputs"), self._inputs, allow_change)
        steps = self.args.steps_per_generation
        # In micro-batches of this run, which may be smaller or larger.
        self._step = state["micro_step"] * steps // state.get("steps_per_generation", steps)
        self._engine.total_generated_tokens = state["generated_tokens"]
        self.funnel_totals = Counter(state["funnel_totals"])
        self._tripwires.restore(state.get("tripwires"), self.args)
        if self.accelerator.is_main_process:
            run_dir = Path(self.args.output_dir)
            checkpoint_files.set_aside_after(run_dir, state["step"])
            truncate_metrics(run_dir / "metrics.jsonl", state["step"])
            if state["last_experience_id"] is not None:
                self._open_store().truncate_after(state["last_experience_id"])  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = Path(self.args.output_dir)
        if self.accelerator.is_main_process:
            checkpoint_files.staging_folder(run_dir)
        self.accelerator.wait_for_everyone()
        self._staging = run_dir / checkpoint_files.STAGING
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(run_dir / f"checkpoint-{best}") if best else None
        if self.accelerator.is_main_process:
            self._commit(run_dir)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As TRL's, with the record by which the adapter can be evaluated, exported and trained on like any of ours."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        folder = Path(output_dir or self.args.output_dir)
        if (folder / "adapter_config.json").is_file():
            write_fingerprint(folder, self.accelerator.unwrap_model(self.model))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint once it is committed: an upload must not run while its files are renamed."""
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _commit(self, run_dir: Path) -> None:
        staged = run_dir / checkpoint_files.STAGING / f"checkpoint-{self.state.global_step}"
        # The Trainer noted the best checkpoint by the path it saw, which was the staging folder's.
        saved = staged / "trainer_state.json"
        state = json.loads(saved.read_text()) | {"best_model_checkpoint": self.state.best_model_checkpoint}
        saved.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
        position = {
            "step": self.state.global_step,
            "micro_step": self._step,
            "steps_per_generation": self.args.steps_per_generation,
            "inputs": self._inputs,
            "generated_tokens": self._engine.total_generated_tokens,
            "funnel_totals": dict(self.funnel_totals),
            "tripwires": self._tripwires.state(),
            "last_experience_id": (
                self._open_store().last_id()  # type: ignore[attr-defined]
                if self.args.with_meta_experience
                else None
            ),
        }
        final = checkpoint_files.commit(staged, run_dir, position)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        checkpoint_files.rotate(run_dir, keep=self.args.save_total_limit, best=self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)  # type: ignore[misc]
