"""A talk with the base model and the trained one: the same questions, the same seeds, one model in memory.

Both answer as in the run: with its system prompt and the variables of its chat template.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mel_lite.engines.base import Request, Sampling
from mel_lite.errors import ConfigError, ModelError
from mel_lite.models.adapters import adapter_base, attach_adapter, find_adapter
from mel_lite.models.chat import render
from mel_lite.recipe import value_in
from mel_lite.report.terminal import plain
from mel_lite.run.folder import process_using
from mel_lite.seeds import seed_for

if TYPE_CHECKING:
    from mel_lite.models.load import ModelSpec

NARROW_COLUMNS = 80
"""Below this width the answers stand one above the other."""
SIDES = ("base", "trained")


@dataclass(frozen=True, slots=True)
class Speaker:
    """What is loaded for a talk, found and checked before it is loaded."""

    adapter: Path
    base: ModelSpec
    system_prompt: str | None
    chat_template_kwargs: dict[str, Any] | None


def find_speaker(run: Path, base: str | None = None, system_prompt: str | None = None) -> Speaker:
    """Return what a run, checkpoint or adapter folder needs for a talk. Loads nothing.

    Args:
        base: location of the base model if it differs from the recorded one.
        system_prompt: None = the run's own.
    Raises: ConfigError when there is no such folder, or the run is still training; ModelError when it holds no adapter,
        or its base cannot be found.
    """
    from dataclasses import replace

    from mel_lite.models.load import check_weights

    if not run.is_dir() and str(run) != "demo":
        raise ConfigError(f"{run}: there is no such folder. Give the folder of a run, such as runs/<name>.")
    if (pid := process_using(run)) is not None:
        raise ConfigError(
            f"{run} is still training (pid {pid}). Wait for its end, or name a checkpoint: mel-lite chat "
            f"{run}/checkpoint-N."
        )
    if (run / "model").is_dir() and not (run / "adapter").is_dir():
        raise ModelError(f"{run} was trained without LoRA, so base and trained model do not share their weights. There "
                         f"is no adapter to compare; load {run / 'model'} with transformers.")  # fmt: skip
    adapter = find_adapter(run)
    spec = adapter_base(adapter)
    spec = spec if base is None else replace(spec, name=base, revision=None)
    check_weights(spec)
    config = next((file for folder in (run, run.resolve().parent) if (file := folder / "config.yaml").is_file()), None)
    own = value_in(config, "data.system_prompt") if system_prompt is None else system_prompt
    return Speaker(adapter, spec, own, value_in(config, "train.chat_template_kwargs"))


@dataclass(slots=True)
class Talk:
    """A loaded base with its adapter, and the conversation of each side."""

    model: Any
    tokenizer: Any
    engine: Any
    speaker: Speaker
    sampling: Sampling
    seed: int
    context_tokens: int
    turns: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def start_over(self) -> None:
        """Forget the conversation so far."""
        self.turns.clear()

    def answer(self, question: str) -> dict[str, str]:
        """Return the answer of each side. Without a chat template, every question stands alone.

        Raises: ConfigError when the question does not fit the context.
        """
        return {side: self._answer(side, question) for side in SIDES}

    def _answer(self, side: str, question: str) -> str:
        turns = [*self.turns.get(side, ()), {"role": "user", "content": question}]
        ids = self._ids(turns)
        if len(ids) + self.sampling.max_new_tokens > self.context_tokens and len(turns) > 1:
            turns = turns[-1:]  # the earlier turns no longer fit
            ids = self._ids(turns)
        room = self.context_tokens - self.sampling.max_new_tokens
        if len(ids) > room:
            raise ConfigError(
                f"the question has {len(ids)} tokens, but the context has room for {room} next to --max-new-tokens "
                f"{self.sampling.max_new_tokens}. Shorten it, or lower --max-new-tokens."
            )
        request = Request(ids, seed_for(self.seed, step=len(turns), prompt_hash=question, index=0, purpose="chat"))
        with self.model.disable_adapter() if side == "base" else nullcontext():
            (completion,) = self.engine.generate([request], self.sampling)
        text = str(self.tokenizer.decode(list(completion.ids), skip_special_tokens=True)).strip()
        self.turns[side] = [*turns, {"role": "assistant", "content": text}]
        return text

    def _ids(self, turns: list[dict[str, str]]) -> tuple[int, ...]:
        system = self.speaker.system_prompt
        if self.tokenizer.chat_template is None:
            question = turns[-1]["content"]
            return render(f"{system}\n\n{question}" if system else question, self.tokenizer)
        first = [{"role": "system", "content": system}] if system else []
        return render([*first, *turns], self.tokenizer, chat_template_kwargs=self.speaker.chat_template_kwargs)


def load_talk(speaker: Speaker, sampling: Sampling, *, seed: int) -> Talk:
    """Load base, adapter and tokenizer. Raises: ModelError when they cannot be loaded or do not fit together."""
    from mel_lite.engines.hf import HFEngine
    from mel_lite.models.load import context_length, eos_ids, load_base, load_tokenizer

    tokenizer = load_tokenizer(speaker.base, saved_in=speaker.adapter)
    base = load_base(speaker.base)
    stops = eos_ids(base, tokenizer)
    model = attach_adapter(base, speaker.adapter)
    engine = HFEngine(model, eos_ids=stops, pad_id=tokenizer.pad_token_id)
    return Talk(model, tokenizer, engine, speaker, sampling, seed, context_length(model))


def answers_view(answers: dict[str, str], width: int) -> RenderableType:
    """Return both answers side by side, or one above the other where the terminal is narrow."""
    panels = [
        Panel(plain(text) if text else Text("(empty)", style="dim"), title=side, title_align="left",
              border_style="green" if side == "trained" else "dim")
        for side, text in answers.items()
    ]  # fmt: skip
    if width < NARROW_COLUMNS:
        return Group(*panels)
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    return table


def answers_text(answers: dict[str, str]) -> Iterator[str]:
    """Yield both answers as plain text, for a file or a pipe."""
    for side, text in answers.items():
        yield f"{side}: {plain(text).plain}"
