"""Evaluate a model on verifiable tasks: greedy Pass@1, Avg@k and unbiased Pass@k, with 95 % intervals."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from mel_lite.engines.base import Completion, Engine, Request, Sampling
from mel_lite.errors import ConfigError, DataError
from mel_lite.intervals import share_of_tasks
from mel_lite.models.chat import prompt_end, render, render_tasks
from mel_lite.seeds import seed_for
from mel_lite.types import Finish, Group, Verdict
from mel_lite.verify.judge import AnswerJudge, Judge, answer_column, group_of

if TYPE_CHECKING:
    import datasets
    from rich.table import Table

    from mel_lite.models.load import ModelSpec


Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean over prompts with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Verdict counts of one prompt. An abstention counts as wrong."""

    prompt_hash: str
    greedy_right: bool
    samples_right: int


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Results of one evaluation, and everything needed to repeat it."""

    pass_at_1: Interval
    """Fraction of greedy answers that are right."""
    avg_at_k: Interval
    """Fraction of sampled answers that are right."""
    pass_at_k: Interval
    """Estimated probability that at least one of k samples is right."""
    k: int
    samples: int
    """Sampled answers per prompt, >= k."""
    n: int
    """Number of prompts counted."""
    skipped_long: int
    """Number of prompts skipped because prompt and answer together exceed the context."""
    skipped_unjudged: int
    """Number of prompts skipped because every verdict was an abstention, as with an unusable reference answer."""
    temperature: float
    max_new_tokens: int
    seed: int
    truncation_rate: float
    """Fraction of all answers, greedy and sampled, that were truncated at `max_new_tokens`."""
    abstain_rate: float
    """Fraction of all answers that the verifier could not judge."""
    mean_tokens: float
    scores: tuple[PromptScore, ...]

    def to_json(self) -> str:
        """Return all fields as a JSON object. `from_json` restores an equal result."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> EvalResult:
        """Restore a result from `to_json` text. Raises DataError for any other text."""
        try:
            values = json.loads(text)
            values.pop("bootstrap", None)  # resamples of the intervals of older versions
            for name in ("pass_at_1", "avg_at_k", "pass_at_k"):
                values[name] = Interval(**values[name])
            values["scores"] = tuple(PromptScore(**score) for score in values["scores"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"not an evaluation result ({reason}). Delete the file and evaluate again.") from error

    def as_table(self, title: str = "evaluation") -> Table:
        """Render the results and their conditions as a rich table."""
        from rich.table import Table

        table = Table(title=title, caption=self.conditions())
        for heading in ("measure", "value", "95 % interval"):
            table.add_column(heading, justify="left" if heading == "measure" else "right")
        rows = {"Pass@1 (greedy)": self.pass_at_1, f"Avg@{self.k}": self.avg_at_k, f"Pass@{self.k}": self.pass_at_k}
        for name, interval in rows.items():
            table.add_row(name, f"{interval.value:.1%}", f"{interval.low:.1%} - {interval.high:.1%}")
        table.add_row("truncated at the token limit", f"{self.truncation_rate:.1%}", "")
        table.add_row("not judged", f"{self.abstain_rate:.1%}", "")
        return table

    def conditions(self) -> str:
        """Return the conditions of the evaluation in one line."""
        parts = [f"{self.n} prompts", f"{self.samples} samples at T={self.temperature:g}", f"seed {self.seed}"]
        parts.append(f"at most {self.max_new_tokens} tokens (mean {self.mean_tokens:.0f})")
        if self.skipped_long:
            parts.append(f"{self.skipped_long} prompts too long")
        if self.skipped_unjudged:
            parts.append(f"{self.skipped_unjudged} prompts without a usable reference")
        return ", ".join(parts)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate the probability that at least one of k samples is right, given c right among n: 1 - C(n-c, k) / C(n, k).

    Unbiased for k fresh samples. Raises ConfigError unless 1 <= k <= n and 0 <= c <= n.
    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ConfigError(f"Pass@k needs 1 <= k <= n samples and 0 <= right <= n, not k={k}, n={n}, right={c}.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_interval(values: Sequence[float], *, resamples: int, seed: int) -> Interval:
    """Return the mean of `values` and its 95 % percentile interval over `resamples` draws with replacement.

    If all values are equal, or there is only one, the interval has zero width and does not reflect the uncertainty.
    """
    import numpy as np

    values_N = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = [values_N[generator.integers(0, len(values_N), len(values_N))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values_N.mean()), float(low), float(high))


def evaluate(
    engine: Engine,
    tokenizer: Any,
    tasks: datasets.Dataset,
    judge: Judge,
    *,
    k: int = 8,
    samples: int | None = None,
    temperature: float = 0.6,
    max_new_tokens: int = 1024,
    seed: int = 42,
    chat_template_kwargs: dict[str, Any] | None = None,
    limit: int | None = None,
    context_tokens: int | None = None,
    prompts: Sequence[tuple[int, ...]] | None = None,
) -> EvalResult:
    """Evaluate the policy that `engine` samples from on `tasks` (column `prompt` and, for most judges, an answer).

    Args:
        k: k of Avg@k and Pass@k.
        samples: sampled answers per prompt, >= k; None = k. More samples improve the estimate of Pass@k.
        limit: maximum number of tasks, taken from the start.
        context_tokens: the model's context. Prompts that leave no room for `max_new_tokens` are skipped and counted.
        prompts: token ids to answer in place of each task's rendered prompt; the seeds stay those of the task.
    Raises: ConfigError for values out of range; DataError if no task counts.
    """
    samples = k if samples is None else samples
    _check(k, samples, temperature, limit)
    tasks = tasks if limit is None else tasks.select(range(min(limit, len(tasks))))
    column = answer_column(tasks.column_names)
    questions = [group_of(row, column) for row in tasks]
    if prompts is None:
        as_ids = functools.partial(render, tokenizer=tokenizer, chat_template_kwargs=chat_template_kwargs)
        prompts = render_tasks((g.prompt for g in questions), as_ids, "evaluation tasks")
    assert len(prompts) == len(questions), "one prompt per task"
    room_tokens = math.inf if context_tokens is None else context_tokens - max_new_tokens
    fitting = [i for i, ids in enumerate(prompts) if len(ids) <= room_tokens]
    if not fitting:
        raise DataError(
            f"None of the {len(prompts)} evaluation prompts leaves room for max_new_tokens={max_new_tokens} in a "
            f"context of {context_tokens} tokens. Lower max_new_tokens, or check that the dataset is not empty."
        )
    groups = [replace(questions[i], prompt_end=prompt_end(prompts[i], tokenizer)) for i in fitting]
    completions = _answer(
        engine, groups, [prompts[i] for i in fitting], samples, temperature, max_new_tokens=max_new_tokens, seed=seed
    )
    texts = [tokenizer.decode(list(c.ids), skip_special_tokens=True) for c in completions]
    verdicts = judge([group for group in groups for _ in range(1 + samples)], texts)
    scores = _score(groups, verdicts, samples)
    return EvalResult(
        **_figures(scores, samples, k),
        k=k,
        samples=samples,
        n=len(scores),
        skipped_long=len(prompts) - len(groups),
        skipped_unjudged=len(groups) - len(scores),
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        truncation_rate=sum(c.finish is Finish.LENGTH for c in completions) / len(completions),
        abstain_rate=sum(v is Verdict.ABSTAIN for v in verdicts) / len(verdicts),
        mean_tokens=sum(len(c.ids) for c in completions) / len(completions),
        scores=scores,
    )


def _check(k: int, samples: int, temperature: float, limit: int | None) -> None:
    if not 1 <= k <= samples:
        raise ConfigError(f"k={k} with samples={samples}: Pass@k needs 1 <= k <= samples. Lower k or raise samples.")
    if not temperature > 0:
        raise ConfigError(
            f"temperature={temperature}: all k samples would equal the greedy answer. Set it above 0 (the paper uses "
            "0.6). Pass@1 is always greedy."
        )
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1.")


def _answer(
    engine: Engine,
    groups: list[Group],
    prompts: list[tuple[int, ...]],
    samples: int,
    temperature: float,
    *,
    max_new_tokens: int,
    seed: int,
) -> list[Completion]:
    """Return for each prompt its greedy answer followed by its samples, in one flat list."""

    def requests(indices: range) -> list[Request]:
        return [
            Request(ids, seed_for(seed, step=0, prompt_hash=group.prompt_hash, index=index, purpose="eval"))
            for group, ids in zip(groups, prompts, strict=True)
            for index in indices
        ]

    engine.wake()
    try:
        greedy = engine.generate(requests(range(1)), Sampling(max_new_tokens, temperature=0.0))
        sampled = engine.generate(requests(range(samples)), Sampling(max_new_tokens, temperature))
    finally:
        engine.sleep()
    return [c for i, first in enumerate(greedy) for c in (first, *sampled[i * samples : (i + 1) * samples])]


def _score(groups: list[Group], verdicts: list[Verdict], samples: int) -> tuple[PromptScore, ...]:
    """Count the right answers per prompt. Prompts with only abstentions are skipped."""
    scores = []
    for i, group in enumerate(groups):
        greedy, *sampled = verdicts[i * (1 + samples) : (i + 1) * (1 + samples)]
        if any(v is not Verdict.ABSTAIN for v in (greedy, *sampled)):
            right = sum(v is Verdict.RIGHT for v in sampled)
            scores.append(PromptScore(group.prompt_hash, greedy is Verdict.RIGHT, right))
    if not scores:
        raise DataError(
            f"The verifier abstained on every answer to all {len(groups)} prompts. Check that it can parse the "
            "reference answers in the answer column."
        )
    return tuple(scores)


def _figures(scores: Sequence[PromptScore], samples: int, k: int) -> dict[str, Interval]:
    """Return the three measures with Wilson intervals over prompts, also where every answer is right or wrong."""
    found = {
        "pass_at_1": share_of_tasks([float(s.greedy_right) for s in scores]),
        "avg_at_k": share_of_tasks([s.samples_right / samples for s in scores], samples),
        "pass_at_k": share_of_tasks([pass_at_k(samples, s.samples_right, k) for s in scores]),
    }
    return {name: Interval(each.value, each.low, each.high) for name, each in found.items()}


@overload
def evaluate_model(
    spec: ModelSpec | None, adapter: Path | None, dataset: str, *, measure: None = None, **options: Any
) -> EvalResult: ...


@overload
def evaluate_model(
    spec: ModelSpec | None, adapter: Path | None, dataset: str, *, measure: Callable[..., Measured], **options: Any
) -> Measured: ...


def evaluate_model(
    spec: ModelSpec | None,
    adapter: Path | None,
    dataset: str,
    *,
    verifier: str | None = None,
    think_tags: list[str] | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    conversational: bool | None = None,
    split: str | None = None,
    limit: int | None = None,
    measure: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Load a model, an optional adapter and tasks, and call `measure` with the transformers engine and `options`.

    Args:
        spec: the base model; None = the one that `adapter` was trained on, loaded with the same options.
        adapter: a run, checkpoint or adapter folder; None = the base model alone.
        dataset, prompt_column, answer_column, system_prompt, split, limit: as in `mel_lite.data.tasks.load_tasks`.
        conversational: turn plain questions into a user turn; None = when the tokenizer has a chat template.
        verifier: None = the one recommended for the dataset, or else `math`.
        measure: a function with the arguments of `evaluate`, which is the default.
        think_tags: tags around thoughts, each as `START END`, as in `MELConfig`.
    Raises: ConfigError if neither model nor adapter is given; errors of loading, data and verifier.
    """
    from mel_lite.data.tasks import load_tasks, recommended_verifier
    from mel_lite.engines.hf import HFEngine
    from mel_lite.models.adapters import adapter_base, attach_adapter, find_adapter
    from mel_lite.models.load import context_length, eos_ids, load_base, load_tokenizer
    from mel_lite.verify.pool import VerifyPool
    from mel_lite.verify.thoughts import parse_tags

    tags = parse_tags(think_tags)
    adapter = None if adapter is None else find_adapter(adapter)
    if spec is None:
        if adapter is None:
            raise ConfigError("nothing to evaluate: pass a model, an adapter, or both.")
        spec = adapter_base(adapter)
    tokenizer = load_tokenizer(spec, saved_in=adapter)
    tasks = load_tasks(
        dataset,
        split=split,
        limit=limit,
        prompt_column=prompt_column,
        answer_column=answer_column,
        system_prompt=system_prompt,
        conversational=tokenizer.chat_template is not None if conversational is None else conversational,
        render=functools.partial(render, tokenizer=tokenizer, chat_template_kwargs=options.get("chat_template_kwargs")),
    )
    model: Any = load_base(spec)
    stops = eos_ids(model, tokenizer)
    if adapter is not None:
        model = attach_adapter(model, adapter)
    engine = HFEngine(model, eos_ids=stops, pad_id=tokenizer.pad_token_id)
    with VerifyPool(verifier or recommended_verifier(dataset) or "math", think_tags=tags) as pool:
        judge = AnswerJudge(pool)
        return (measure or evaluate)(engine, tokenizer, tasks, judge, context_tokens=context_length(model), **options)
