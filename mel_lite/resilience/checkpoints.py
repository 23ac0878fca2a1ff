"""Save and resume: TRL's checkpoint, built in staging, committed as a whole, restored exactly and without pickles."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import LoraConfig
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from mel_lite.engines.metered import PhaseClock
from mel_lite.errors import CheckpointError, DiskFullError
from mel_lite.files import nearest_existing_folder
from mel_lite.hub.model_card import write_card_so_far
from mel_lite.models.adapters import RECORD, base_name, base_record, check_base, write_record
from mel_lite.report.record import record_here
from mel_lite.resilience import checkpoint_files
from mel_lite.resilience.resume_checks import began_unmarked, check_inputs, inputs
from mel_lite.resilience.state_files import (
    OPTIMIZER,
    PICKLED_STATE,
    RNG,
    SCALER,
    SCHEDULER,
    check_weights,
    dump,
    load,
    pickles,
    rng_state,
    set_rng_state,
    usable,
)
from mel_lite.resilience.trackers import SideService
from mel_lite.resilience.whole_states import gathered, load_weights, spread_optimizer_state, whole_weights
from mel_lite.training.around_update import tokens_are_spent
from mel_lite.training.frozen_reader import FrozenReader
from mel_lite.training.metrics import truncate_metrics
from mel_lite.training.sharding.weights import Sharding

logger = logging.getLogger(__name__)

BYTES_PER_WEIGHT = 12
"""Size of a checkpoint: a float32 weight with both moments of Adam, the largest common case."""


class AtomicCheckpoints:
    """Mixin over a TRL trainer: checkpoints are whole or absent, and a resumed run continues bit for bit.

    Optimizer, scheduler, scaler and RNG states are JSON and safetensors under transformers' own file names. With FSDP2
    they are those of one process, so that a run may continue on another number of processes. DeepSpeed reads and writes
    a format of its own, pickles among it; there these states are left to it.
    """

    args: Any
    state: Any
    accelerator: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    lesson_context: Any
    frozen_reader: FrozenReader | None
    clock: PhaseClock
    sharding: Sharding
    stateful: tuple[Any, ...]
    """Parts of the run with `state_dict()` and `load_state_dict(state)`; their states share one JSON object."""
    side_service: SideService
    _step: int
    _staging: Path | None = None
    """Folder that a save in flight writes to."""

    # ---- resume ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *, allow_change: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        """Train like TRL. A resume first verifies the checkpoint, then rolls store and metrics back to its step.

        A run whose last step was saved is loaded and not trained further. `allow_change` names inputs that may differ
        from the checkpoint's: dataset, templates, chat_template, dtype, batch.

        Raises: CheckpointError when no whole checkpoint exists, ModelError when it belongs to another base model,
            ConfigError when it was made from other inputs.
        """
        if self.args.save_strategy != "no" and self.accelerator.is_main_process:
            self._warn_of_little_space()
        if self.sharding.in_lockstep:
            _ = self._inputs, self.base_record  # while the weights are as they were loaded
        if not resume_from_checkpoint:
            return super().train(**kwargs)  # type: ignore[misc]
        path = self._resolve(resume_from_checkpoint)
        with usable(path / "trainer_state.json"):
            saved = TrainerState.load_from_json(str(path / "trainer_state.json"))
            done = int(saved.global_step)
            int(saved.train_batch_size), float(saved.epoch)  # transformers needs both; a save always has them
        with usable(path / checkpoint_files.STATE):
            self._roll_back(path, allow_change)
        if 0 < self.args.max_steps <= done or tokens_are_spent(self, done):
            # transformers would take one more step before it looks at max_steps or stops at a callback's word.
            self._load_from_checkpoint(str(path))
            self.state = saved
            return TrainOutput(done, 0.0, {})
        return super().train(resume_from_checkpoint=str(path), **kwargs)  # type: ignore[misc]

    @cached_property
    def base_record(self) -> dict[str, Any]:
        """The base of the trained adapter, as `mel_lite.json` records it."""
        with self.sharding.whole():
            return base_record(self.accelerator.unwrap_model(self.model))

    @cached_property
    def _inputs(self) -> dict[str, str]:
        return inputs(self)

    def _resolve(self, wanted: str | bool) -> Path:
        """Choose the checkpoint on rank 0, where a damaged one is renamed, and broadcast it."""
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

    def _roll_back(self, path: Path, allow_change: Sequence[str]) -> None:
        """Restore counters, store and metrics to the step of `path`; later steps are repeated."""
        if (path / RECORD).is_file():
            with self.sharding.whole():
                check_base(self.model, path)
        state = checkpoint_files.read_state(path)
        if not state:
            return
        self._keep_unmarked(state.get("inputs"), allow_change)
        check_inputs(state.get("inputs"), self._inputs, allow_change)
        steps = self.args.steps_per_generation
        # Counted in this run's micro-batches, whose size may differ from the checkpoint's.
        self._step = state["micro_step"] * steps // state.get("steps_per_generation", steps)
        for part in self.stateful:
            part.load_state_dict(state)
        if self.frozen_reader is not None:
            self.frozen_reader.load(path)
        if self.accelerator.is_main_process:
            run_dir = Path(self.args.output_dir)
            checkpoint_files.set_aside_after(run_dir, state["step"])
            truncate_metrics(run_dir / "metrics.jsonl", state["step"])
            if state["last_experience_id"] is not None:
                self._roll_back_store(path, run_dir, state["last_experience_id"], state["step"])

    def _keep_unmarked(self, began: Mapping[str, str] | None, allow_change: Sequence[str]) -> None:
        """Continue a run that began without marked forks, such as an older release's, without them."""
        allowed = {"templates", "train.templates", "train.mark_fork"}.intersection(allow_change)
        if self.lesson_context.mark_fork and not allowed and began_unmarked(began, self.lesson_context):
            logger.warning("The run began with analysis prompts without marks (mark_fork=False) and continues so.")
            self.lesson_context = replace(self.lesson_context, mark_fork=False)
            self.__dict__.pop("_inputs", None)

    def _roll_back_store(self, path: Path, run_dir: Path, last_id: int, steps: int) -> None:
        """Delete later experiences. A checkpoint of another folder continues with a new store: none is read back."""
        store: Any = self.store  # type: ignore[attr-defined]
        if path.resolve().parent != run_dir.resolve() and store.last_id() == 0:
            if last_id:
                logger.warning(
                    "%s is a checkpoint of another folder: the %s earlier lessons stay in that folder's "
                    "experiences.sqlite, and new ones are stored in %s.", path, last_id, run_dir,
                )  # fmt: skip
            return
        store.truncate_after(last_id, steps=steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_weights(Path(resume_from_checkpoint))
        model = model or self.model
        if self.sharding.fsdp:
            load_weights(model, Path(resume_from_checkpoint))
            return
        dtypes = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        for name, weight in model.named_parameters():
            # PEFT loads a 16-bit adapter (TRL's choice on a 4-bit base) as float32, which would change the run.
            weight.data = weight.data.to(dtypes.get(name, weight.dtype))

    def _load_best_model(self) -> None:
        check_weights(Path(self.state.best_model_checkpoint))
        if self.sharding.fsdp:
            load_weights(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()  # type: ignore[misc]

    # ---- save ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Build, then commit. Raises: DiskFullError when there is no room; the checkpoint before it stays whole."""
        run_dir = Path(self.args.output_dir)
        try:
            with self.clock("checkpoint"):
                self._build_and_commit(run_dir, model, trial)
        except Exception as error:
            if not is_full(error):
                raise
            shutil.rmtree(run_dir / checkpoint_files.STAGING, ignore_errors=True)
            raise DiskFullError(self._no_room(run_dir, error)) from error

    def _build_and_commit(self, run_dir: Path, model: Any, trial: Any) -> None:
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save like TRL, with FSDP2 as one process would. All ranks call it."""
        if not self.sharding.fsdp:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        weights = whole_weights(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # type: ignore[attr-defined]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save like TRL, with the record that lets eval, export and `--adapter` take the adapter as one of ours."""
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle nobody reads: config.yaml has the options
        if (folder / "adapter_config.json").is_file():
            write_record(folder, self.base_record)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the run's card in place of TRL's, which names folders of this machine and knows no meta-experience."""
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        model = self.accelerator.unwrap_model(self.model)
        config: dict[str, Any] = {"train": self.args.to_dict(), "model": {"name": base_name(model)}}
        config |= {} if dataset_name is None else {"data": {"train": dataset_name}}
        if isinstance(lora := getattr(model, "peft_config", {}).get("default"), LoraConfig):
            config["lora"] = {"r": lora.r, "alpha": lora.lora_alpha}
        ends = self.state.max_steps > 0 and self.state.global_step >= self.state.max_steps
        self.side_service.call(
            write_card_so_far, Path(self.args.output_dir), config, record_here(), name=model_name,
            tags=[tags] if isinstance(tags, str) else tags or (), with_lessons=ends,
        )  # fmt: skip

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint once it is committed: its files must not be renamed during the upload."""
        if self._staging is None:
            self.side_service.call(super()._push_from_checkpoint, checkpoint_folder)  # type: ignore[misc]

    def _commit(self, run_dir: Path) -> None:
        staged = run_dir / checkpoint_files.STAGING / f"checkpoint-{self.state.global_step}"
        # The Trainer recorded the best checkpoint under its staging path.
        saved = staged / "trainer_state.json"
        state = json.loads(saved.read_text()) | {"best_model_checkpoint": self.state.best_model_checkpoint}
        saved.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")
        position = {
            "step": self.state.global_step,
            "micro_step": self._step,
            "steps_per_generation": self.args.steps_per_generation,
            "inputs": self._inputs,
            "last_experience_id": (
                self.store.last_id() if self.args.with_meta_experience else None  # type: ignore[attr-defined]
            ),
        }
        for part in self.stateful:
            position |= part.state_dict()
        if self.frozen_reader is not None:
            self.frozen_reader.save(staged)
        final = checkpoint_files.commit(staged, run_dir, position)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        checkpoint_files.rotate(run_dir, keep=self.args.save_total_limit, best=self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)  # type: ignore[misc]

    def _no_room(self, run_dir: Path, error: Exception) -> str:
        saved = checkpoint_files.committed(run_dir)
        kept = f"{saved[-1]} is whole" if saved else "none was saved before it"
        return (
            f"The disk of {run_dir} has no room for checkpoint-{self.state.global_step} ({error}); {kept}. Free space, "
            "or lower save_total_limit, then resume with --resume."
        )

    def _warn_of_little_space(self) -> None:
        """Warn when the disk cannot hold one checkpoint more than are kept, which is what a save needs."""
        weights = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        kept = self.args.save_total_limit or 1
        needed_bytes = BYTES_PER_WEIGHT * weights * (kept + 1)
        free_bytes = shutil.disk_usage(nearest_existing_folder(Path(self.args.output_dir))).free
        if free_bytes < needed_bytes:
            logger.warning(
                "The disk of %s has %.1f GB free, but %s checkpoints of %.1f GB may be on it. Free space, or lower "
                "save_total_limit.",
                self.args.output_dir,
                free_bytes / 1e9,
                kept + 1,
                BYTES_PER_WEIGHT * weights / 1e9,
            )

    # ---- states without pickles ----

    def _save_rng_state(self, output_dir: str) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)  # a rank may get here before rank 0 has saved the model
        dump(self._rng_stem(folder), rng_state(all_gpus=self.args.world_size > 1))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stem = self._rng_stem(Path(checkpoint))
        if stem.with_suffix(".json").is_file():
            with usable(stem.with_suffix(".json")):
                set_rng_state(load(stem))
        else:
            logger.warning("%s is missing: random numbers continue from another state.", stem.with_suffix(".json"))

    def _rng_stem(self, folder: Path) -> Path:
        return folder / (RNG if self.args.world_size <= 1 else f"{RNG}_{self.args.process_index}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharding.deepspeed:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        moments = gathered(self.optimizer.state_dict()) if self.sharding.fsdp else None
        if self.args.should_save:
            dump(Path(output_dir) / OPTIMIZER, moments or self.optimizer.state_dict())
            dump(Path(output_dir) / SCHEDULER, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.sharding.deepspeed:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        folder = Path(checkpoint)
        found = pickles(folder, PICKLED_STATE)
        if (folder / f"{OPTIMIZER}.json").is_file():
            with usable(folder / f"{OPTIMIZER}.json"):
                moments = load(folder / OPTIMIZER)
                if self.sharding.fsdp:
                    moments = spread_optimizer_state(self.optimizer, moments)
                self.optimizer.load_state_dict(moments)
            with usable(folder / f"{SCHEDULER}.json"):
                self.lr_scheduler.load_state_dict(load(folder / SCHEDULER))
        elif found:
            logger.warning(
                "%s: %s are pickles and are not loaded, since loading one can run any code. The optimizer and the "
                "learning rate start from scratch on the saved weights.",
                folder,
                ", ".join(found),
            )
        if not found:  # else transformers would open them
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            dump(Path(output_dir) / SCALER, scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None and (Path(checkpoint) / f"{SCALER}.json").is_file():
            with usable(Path(checkpoint) / f"{SCALER}.json"):
                scaler.load_state_dict(load(Path(checkpoint) / SCALER))


def is_full(error: BaseException) -> bool:
    """Return True when an error reports a full disk or quota. safetensors and SQLite say so in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    return any(words in text for words in ("No space left on device", "os error 28", "disk is full", "Disk quota"))
