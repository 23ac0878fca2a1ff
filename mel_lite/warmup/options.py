"""Options and result of a warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mel_lite.errors import ConfigError
from mel_lite.evaluate import EvalResult
from mel_lite.verify.thoughts import parse_tags


@dataclass(frozen=True, slots=True)
class WarmupOptions:
    """Training options of the warm-up."""

    epochs: float = 1.0
    max_steps: int = -1
    """Optimizer steps; -1 = as many as `epochs` needs."""
    batch_size: int = 8
    """Examples per optimizer step."""
    micro_batch_size: int | None = None
    """Examples per forward pass; None = `batch_size`."""
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 10
    max_length_tokens: int | None = None
    """Longest example, prompt and completion together; None = the model's context. Longer ones are skipped."""
    save_steps: int | None = None
    """Interval in steps for saving the adapter in `checkpoint-N` as well; None = save only at the end."""
    seed: int = 42

    def __post_init__(self) -> None:
        if self.micro < 1 or self.batch_size < 1 or self.batch_size % self.micro:
            raise ConfigError(
                f"batch_size={self.batch_size}, micro_batch_size={self.micro_batch_size}: both must be at least 1, and "
                "batch_size a multiple of micro_batch_size. Change one of them."
            )
        if not self.learning_rate > 0 or self.epochs <= 0 or self.max_steps == 0:
            raise ConfigError(
                f"learning_rate={self.learning_rate}, epochs={self.epochs}, max_steps={self.max_steps}: nothing would "
                "be learned. Give positive values (with max_steps=-1, epochs decides)."
            )

    @property
    def micro(self) -> int:
        """Number of examples per forward pass."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size


@dataclass(frozen=True, slots=True)
class WarmupData:
    """Split and columns of the examples, and the rendering of them and of the evaluation tasks."""

    split: str | None = None
    """Split of the examples; None = its training split."""
    prompt_column: str | None = None
    """Column of the examples' prompt; None = by its usual names."""
    completion_column: str = "completion"
    system_prompt: str | None = None
    """System message before every prompt, of examples and of evaluation tasks."""
    conversational: bool | None = None
    """Turn plain questions into a user turn in the evaluation; None = when the tokenizer has a chat template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, for examples and evaluation tasks."""


@dataclass(frozen=True, slots=True)
class WarmupEval:
    """Tasks to evaluate the model on before and after; fields as in `mel_lite.evaluate.evaluate`."""

    dataset: str
    verifier: str | None = None
    """None = the recommended verifier of the dataset."""
    split: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    limit: int | None = None
    k: int = 8
    temperature: float = 0.6
    max_new_tokens: int = 512
    think_tags: list[str] | None = None
    """Tags around thoughts, as in `MELConfig`."""

    def __post_init__(self) -> None:
        parse_tags(self.think_tags)


@dataclass(frozen=True, slots=True)
class WarmupResult:
    """Result of a warm-up."""

    adapter: Path
    examples: int
    skipped_long: int
    """Examples left out because prompt and completion together exceed the context."""
    trained_tokens: int
    """Completion tokens in one pass over the examples."""
    steps: int
    final_loss_nats: float
    """Mean loss per completion token over the last logged steps."""
    took_s: float
    """Duration of training without the evaluations, in seconds."""
    before: EvalResult | None = None
    after: EvalResult | None = None

    def summary(self) -> str:
        """Describe the training and the adapter's path in two lines."""
        return (
            f"{self.steps} steps on {self.examples} examples ({self.trained_tokens} tokens to learn, "
            f"{self.skipped_long} too long) in {self.took_s:.0f} s, last loss {self.final_loss_nats:.3f} nats/token\n"
            f"adapter   {self.adapter}"
        )


__all__ = ["WarmupData", "WarmupEval", "WarmupOptions", "WarmupResult"]
