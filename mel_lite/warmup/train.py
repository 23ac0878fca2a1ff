"""Warm-up: supervised fine-tuning on formatted examples, so that rollouts and analyses have the right format before RL.

TRL's SFTTrainer does the training, with the loss on the completions only. The result is a LoRA adapter that
`mel-lite train --adapter DIR` starts from.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mel_lite.data.tasks import load_tasks, recommended_verifier
from mel_lite.deferred import building_plain_layers
from mel_lite.errors import ConfigError
from mel_lite.evaluate import EvalResult, evaluate
from mel_lite.models.adapters import LoraSpec, attach_adapter, find_adapter, lora_config, write_fingerprint
from mel_lite.models.chat import render
from mel_lite.models.load import (
    ModelSpec,
    context_length,
    eos_ids,
    load_base,
    load_config,
    load_tokenizer,
    turn_end_id,
)
from mel_lite.training.batches.packing import Block
from mel_lite.training.scoring import install_scoring_head
from mel_lite.verify.judge import AnswerJudge
from mel_lite.verify.thoughts import parse_tags
from mel_lite.warmup.examples import Example, load_examples, tokenize
from mel_lite.warmup.options import WarmupData, WarmupEval, WarmupOptions, WarmupResult

if TYPE_CHECKING:
    from rich.console import Console

_LOG_EVERY = 5


def warmup(
    examples_file: Path | str,
    output_dir: Path,
    *,
    model: ModelSpec,
    lora: LoraSpec | None = None,
    adapter: Path | None = None,
    data: WarmupData | None = None,
    options: WarmupOptions | None = None,
    evaluation: WarmupEval | None = None,
    console: Console | None = None,
) -> WarmupResult:
    """Fine-tune a LoRA adapter on examples and save it in `output_dir`. Evaluate it before and after if requested.

    Args:
        lora: the adapter to train; None = `LoraSpec()`, or the shape of `adapter`.
        adapter: an adapter to continue training.
        evaluation: the tasks to evaluate on; None = no evaluation.
    Raises: ConfigError when `output_dir` is not empty or `lora` is given together with `adapter`; DataError for
        examples and tasks that cannot be used; ModelError for a model or adapter that cannot be used.
    """
    options, data = options or WarmupOptions(), data or WarmupData()
    if lora is not None and adapter is not None:
        raise ConfigError("lora and adapter together: an adapter has its own shape. Give only one of them.")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ConfigError(f"output_dir={str(output_dir)!r} is not empty. Give a new folder; nothing is overwritten.")
    examples = _examples(examples_file, data)
    adapter = None if adapter is None else find_adapter(adapter)
    tokenizer = load_tokenizer(model, saved_in=adapter)
    context_tokens = context_length(load_config(model))
    room_tokens = min(context_tokens, options.max_length_tokens or context_tokens)
    rows, skipped = tokenize(
        examples,
        tokenizer,
        max_length_tokens=room_tokens,
        turn_end=turn_end_id(tokenizer),
        chat_template_kwargs=data.chat_template_kwargs,
    )
    if skipped:
        _say(console, f"{skipped} of {len(examples)} examples left out: longer than {room_tokens} tokens.")
    base = load_base(model)
    install_scoring_head(base)
    stops = eos_ids(base, tokenizer)
    peft_model = _adapted(base, lora, adapter)
    measure = _measure(peft_model, tokenizer, stops, evaluation, data, seed=options.seed)
    before = measure("before", console)
    started_s = time.monotonic()
    trainer = _train(peft_model, tokenizer, rows, output_dir, options, console)
    took_s = time.monotonic() - started_s
    save(peft_model, output_dir, revision=model.revision)
    tokenizer.save_pretrained(output_dir)  # keeps the chat template that the adapter was trained with
    return WarmupResult(
        adapter=output_dir,
        examples=len(rows),
        skipped_long=skipped,
        trained_tokens=sum(label != -100 for row in rows for label in row["labels"]),
        steps=trainer.state.global_step,
        final_loss_nats=next(
            (log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log), float("nan")
        ),
        took_s=took_s,
        before=before,
        after=measure("after", console),
    )


def _examples(source: Path | str, data: WarmupData) -> list[Example]:
    return load_examples(
        source,
        split=data.split,
        prompt_column=data.prompt_column,
        completion_column=data.completion_column,
        system_prompt=data.system_prompt,
    )


def save(model: Any, folder: Path, *, revision: str | None = None) -> None:
    """Save a PEFT adapter with the record of its base, as `attach_adapter` expects it."""
    model.save_pretrained(folder)
    write_fingerprint(folder, model, revision=revision)


def _adapted(base: Any, lora: LoraSpec | None, adapter: Path | None) -> Any:
    from peft import get_peft_model

    if adapter is not None:
        return attach_adapter(base, adapter, trainable=True)
    with building_plain_layers():
        return get_peft_model(base, lora_config(lora or LoraSpec()))


def _measure(
    model: Any,
    tokenizer: Any,
    stops: tuple[int, ...],
    tasks: WarmupEval | None,
    data: WarmupData,
    *,
    seed: int,
) -> Callable[[str, Console | None], EvalResult | None]:
    """Return a function that evaluates the current model. Tasks are loaded now, so that errors come before training."""
    if tasks is None:
        return lambda name, console: None
    from mel_lite.engines.hf import HFEngine
    from mel_lite.verify.pool import VerifyPool

    has_template = tokenizer.chat_template is not None
    questions = load_tasks(
        tasks.dataset,
        split=tasks.split,
        limit=tasks.limit,
        prompt_column=tasks.prompt_column,
        answer_column=tasks.answer_column,
        system_prompt=data.system_prompt,
        conversational=has_template if data.conversational is None else data.conversational,
        render=partial(render, tokenizer=tokenizer, chat_template_kwargs=data.chat_template_kwargs),
    )
    engine = HFEngine(model, eos_ids=stops, pad_id=tokenizer.pad_token_id)

    def measure(name: str, console: Console | None) -> EvalResult:
        verifier = tasks.verifier or recommended_verifier(tasks.dataset) or "math"
        with VerifyPool(verifier, think_tags=parse_tags(tasks.think_tags)) as pool:
            result = evaluate(
                engine,
                tokenizer,
                questions,
                AnswerJudge(pool),
                k=tasks.k,
                temperature=tasks.temperature,
                max_new_tokens=tasks.max_new_tokens,
                seed=seed,
                chat_template_kwargs=data.chat_template_kwargs,
                context_tokens=context_length(model),
            )
        if console is not None:
            console.print(result.as_table(f"{name} the warm-up"))
        return result

    return measure


def _train(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    output_dir: Path,
    options: WarmupOptions,
    console: Console | None,
) -> Any:
    import datasets
    import torch
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig

    on_cpu = not torch.cuda.is_available()
    args = SFTConfig(
        output_dir=str(output_dir),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=options.batch_size // options.micro,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
        max_length=None,  # no truncation: examples that are too long were left out
        train_sampling_strategy="sequential",  # the rows are already ordered
        gradient_checkpointing=not on_cpu,
        bf16=False,  # the base keeps the dtype it was loaded in, and LoRA weights the one PEFT gave them
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_steps=_LOG_EVERY,
        save_strategy="no" if options.save_steps is None else "steps",
        save_steps=options.save_steps or 500,
        save_only_model=True,
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    trainer = _trainer_class()(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(in_batches(rows, options.micro, options.seed)),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_progress(console))
    trainer.train()
    return trainer


def in_batches(rows: Sequence[dict[str, list[int]]], size: int, seed: int) -> list[dict[str, list[int]]]:
    """Order rows so that each batch of `size` holds rows of similar length, with the batches shuffled.

    Sorting within large blocks, as transformers' `group_by_length` does, would alternate long phases of long and of
    short examples, and the model would forget one kind while it trains on the other.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(rows, len(rows))
    shuffled.sort(key=lambda row: len(row["input_ids"]))
    batches = [shuffled[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(batches)
    # The incomplete batch must be the last one: elsewhere it would shift the boundaries of later batches.
    batches.sort(key=lambda batch: len(batch) < size)
    return [row for batch in batches for row in batch]


def _trainer_class() -> type:
    """Return TRL's SFTTrainer with its loss, the mean NLL per completion token, computed by our operator.

    TRL 1.15's own fused head is a Triton kernel, which needs a GPU.
    """
    from trl import SFTTrainer

    class CompletionTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            block = Block(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], temperature=1.0)
            scores = model(score_blocks=[block])
            tokens = len(scores.logp_N) if num_items_in_batch is None else num_items_in_batch
            loss = -scores.logp_N.sum() / tokens
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # DDP averages the gradients, but they must be summed
            return (loss, scores) if return_outputs else loss

    return CompletionTrainer


def _progress(console: Console | None) -> Any:
    """Return a callback that prints loss and remaining time every few steps."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        started_s = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started_s = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_log |= state.global_step >= state.max_steps  # the last loss is part of the result

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if not logs or "loss" not in logs or not state.global_step:
                return
            passed_s = time.monotonic() - self.started_s
            left_s = passed_s / state.global_step * (state.max_steps - state.global_step)
            _say(
                console,
                f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f} nats/token  "
                f"{passed_s:.0f} s, {left_s:.0f} s left",
            )

    return Progress()


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text)


__all__ = ["save", "warmup"]
