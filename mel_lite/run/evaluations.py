"""Evaluations of a run on its held-out tasks: before, during and after training, always on the same tasks and seeds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from mel_lite.engines import distributed
from mel_lite.engines.distributed import SplitEngine
from mel_lite.evaluate import EvalResult, evaluate
from mel_lite.files import atomic_write_text
from mel_lite.lessons.bank import LessonBank
from mel_lite.lessons.bank.prompt_memory import lesson_prompts
from mel_lite.models.load import context_length
from mel_lite.recipe import EvalOptions
from mel_lite.resilience.saved_bank import kept_lessons
from mel_lite.resilience.tracker_tables import send_evaluation
from mel_lite.trainer import MELTrainer


class Evaluations(TrainerCallback):
    """Measures before the first step, every `every_steps` steps, and on request at the end.

    Nothing of the training changes: sampling is seeded per sequence, and evaluations' tokens are not counted.
    """

    def __init__(
        self,
        options: EvalOptions,
        trainer: MELTrainer,
        held_out: Any | None,
        folder: Path,
        *,
        resumed: bool,
        shown: Callable[[], AbstractContextManager[None]],
        console: Console,
    ) -> None:
        """Prepare evaluations on `held_out`; None = there are none.

        Args:
            folder: place of before.json and after.json.
            resumed: the model has been trained since the run began, so the stored result is the one before training.
            shown: context that shows and times one evaluation.
        """
        self._options, self._trainer, self._held_out, self._folder = options, trainer, held_out, folder
        self._resumed, self._shown, self._console = resumed, shown, console
        self._before: EvalResult | None = None
        self._unsaid = ""
        """Line about an evaluation during training, which is printed after the line of its step."""

    @property
    def before(self) -> EvalResult | None:
        """Result before training; of a run that was finished already, the stored one."""
        return self._before or self._stored()

    def after(self) -> EvalResult | None:
        """Measure the trained model, and store the result; with `with_lessons`, with lessons in the prompts."""
        return self._measure("after training", store="after", with_lessons=self._options.with_lessons)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._before = self._stored() if self._resumed else self._measure("before training", store="before")
        self._trainer.stop_together()  # if a signal arrived during the evaluation

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self._options.every_steps
        if not every or state.global_step % every or state.global_step >= state.max_steps:
            return
        if control.should_training_stop:  # the last evaluation follows
            return
        found = self._evaluate()
        if found is None:
            return
        self._unsaid = _line(f"after step {state.global_step}", found)
        logs = {f"eval_{name}": getattr(found, name).value for name in ("pass_at_1", "avg_at_k", "pass_at_k")}
        # Not `trainer.log`, which would take the step's own figures with it.
        self._trainer.callback_handler.call_event("on_log", args, state, control, logs=logs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._say_rest()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._say_rest()

    def _say_rest(self) -> None:
        if self._unsaid:
            self._say(self._unsaid)
            self._unsaid = ""

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=not self._console.is_terminal)

    def _stored(self) -> EvalResult | None:
        path = self._folder / "before.json"
        return EvalResult.from_json(path.read_text()) if path.is_file() else None

    def _measure(self, when: str, *, store: str, with_lessons: bool = False) -> EvalResult | None:
        """Evaluate, store the result as `store`.json, send it to the trackers, and print it."""
        result = self._evaluate(with_lessons=with_lessons)
        if result is None:
            return None
        if distributed.rank() == 0:
            self._folder.mkdir(exist_ok=True)
            atomic_write_text(self._folder / f"{store}.json", result.to_json() + "\n")
            send_evaluation(self._trainer, result)
        self._say(_line(when, result))
        return result

    def _evaluate(self, *, with_lessons: bool = False) -> EvalResult | None:
        """Return the result on the held-out tasks; None without any."""
        if self._held_out is None:
            return None
        trainer = self._trainer
        lengths: dict[str, Any] = {
            "max_new_tokens": self._options.max_new_tokens or trainer.args.max_completion_length,
            "context_tokens": min(context_length(trainer.model), trainer.engine.context_tokens or sys.maxsize),
        }
        prompts = self._with_lessons(lengths) if with_lessons else None
        with self._shown(), trainer.engine.evaluating(), trainer.sharding.whole():
            return evaluate(
                SplitEngine(trainer.engine) if distributed.world() > 1 else trainer.engine,
                trainer.processing_class,
                self._held_out,
                trainer.judge,
                k=self._options.k,
                temperature=self._options.temperature,
                seed=trainer.args.seed,
                chat_template_kwargs=trainer.args.chat_template_kwargs,
                prompts=prompts,
                **lengths,
            )

    def _with_lessons(self, lengths: dict[str, Any]) -> list[tuple[int, ...]]:
        """Return the prompts with the lessons of the run's bank, or else with its kept meta-experiences."""
        trainer = self._trainer
        bank = trainer.bank
        if bank is None:
            bank = LessonBank(trainer.args.bank_options)
            lessons = distributed.on_first(lambda: kept_lessons(trainer.store), cpu=bool(trainer.args.use_cpu))
            bank.extend(lessons)
        asked = lesson_prompts(
            self._held_out, trainer.processing_class, bank, trainer.lesson_context.templates,
            chat_template_kwargs=trainer.args.chat_template_kwargs, **lengths,
        )  # fmt: skip
        self._console.print(
            f"{len(asked.counts)} of {len(asked.plain)} evaluation tasks have lessons in their prompts", highlight=False
        )
        return asked.taught


def _line(when: str, result: EvalResult) -> str:
    return f"evaluation {when}: Pass@1 {result.pass_at_1}, Avg@{result.k} {result.avg_at_k}"


__all__ = ["Evaluations"]
