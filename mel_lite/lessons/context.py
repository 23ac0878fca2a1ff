"""The policy, prompts, judge and options that every stage of lesson drawing shares."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mel_lite.engines.base import Engine, Sampling
from mel_lite.lessons.prompts import Templates
from mel_lite.lessons.reading import Scorer
from mel_lite.verify.judge import Judge


@dataclass(frozen=True, slots=True)
class LessonContext:
    """Passed to each stage as it is; fields named like a `MELConfig` option have its meaning."""

    engine: Engine
    """The current policy."""
    tokenizer: Any
    templates: Templates
    judge: Judge
    clock: Callable[[str], AbstractContextManager[None]]
    """Opens a timed phase by name."""
    analysis: Sampling
    replay: Sampling
    max_context_tokens: int
    run_seed: int
    scorer: Scorer | None = None
    """The current policy as a reader of texts; only scored proof needs it."""
    context_tokens: int = sys.maxsize
    """Longest sequence, prompt and completion together, that the model takes."""
    mark_fork: bool = True
    leak_policy: str = "reject"
    trains_whole_analysis: bool = True
    """The leak guard also reads the text around the parsed parts, since it is trained on."""
    replay_attempts: int = 1
    control: bool = False
    replay_criterion: str = "solved"
    chat_template_kwargs: Mapping[str, Any] | None = None
    hopeless: Callable[[Sequence[int]], str] | None = None
    """Says why the ids of an unfinished analysis are not worth more; '' while they are. None: none is ended early."""
