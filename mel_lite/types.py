"""Values of options, and the data types of one MEL step in the order the step makes them.

    Rollout -> Group -> Pair -> Analysis -> MetaExperience -> LeakReport -> Replay -> Experience -> Lesson

All data types are frozen: no stage edits the result of an earlier one. Token ids are plain tuples of ints, exactly as
the engine sampled them; text exists only for verifiers, prompts and people.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from mel_lite.errors import ConfigError


class Choice(StrEnum):
    """Base of an option's values: equal to their text, each with one line on its meaning in `__doc__`."""

    def __new__(cls, value: str, meaning: str = "") -> Self:
        """Make the member that equals the text `value`."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.__doc__ = meaning
        return member


class Algorithm(Choice):
    """Policy term of the loss."""

    MEL = "mel", "`grpo` with meta-experience; with tools or environments of the Python API, plain `grpo`."
    GRPO = "grpo", "TRL's loss, on advantages normalized within each group."
    REINFORCE_PP = "reinforce++", "TRL's loss, on advantages normalized over the whole batch."
    RFT = "rft", "NLL of the right completions alone."


class PairStrategy(Choice):
    """Order in which the (right, wrong) pairs of a mixed group are chosen."""

    LONGEST_PREFIX = "longest_prefix", "The longest common token prefix first: such pairs differ least."
    DISTINCT_FORKS = "distinct_forks", "The same, but first one pair for every place where two completions part."
    RANDOM = "random", "A random order, drawn from the run's seed."
    SHORTEST = "shortest", "The fewest tokens of both first: the cheapest context."


class LeakPolicy(Choice):
    """Treatment of a meta-experience that contains the reference answer."""

    REJECT = "reject", "Drop it."
    REDACT = "redact", "Replace the offending spans by `[...]`; drop it if it still leaks or little text is left."
    OFF = "off", "Disable the leak guard."


class ReplayCriterion(Choice):
    """Condition for keeping a replayed meta-experience."""

    SOLVED = "solved", "More than half of the attempts with it are right (the paper's rule, with one attempt)."
    UPLIFT = "uplift", "The share of right attempts with it is above that of the attempts without it."
    SOLVED_ONCE = "solved_once", "One attempt with it is right; they are made one by one until then."
    SCORED = "scored", "It makes the group's right rollouts likelier than the wrong ones; no replay is generated."
    SCORED_SOLVED = "scored+solved", "`scored`, then `solved` for those that pass."
    SCORED_SOLVED_ONCE = "scored+solved_once", "`scored`, then `solved_once` for those that pass."
    SCORED_UPLIFT = "scored+uplift", "`scored`, then `uplift` for those that pass."

    @property
    def scores(self) -> bool:
        """True when rollouts are scored with and without the meta-experience."""
        return self.value.startswith("scored")

    @property
    def replays(self) -> bool:
        """True when the question is attempted again."""
        return self is not ReplayCriterion.SCORED

    @property
    def needs_one(self) -> bool:
        """True when one right attempt is enough."""
        return self.value.endswith("solved_once")

    @property
    def compares(self) -> bool:
        """True when it needs attempts without the meta-experience, too."""
        return self.value.endswith("uplift")


class Schedule(Choice):
    """Time at which analyses and replays are sampled."""

    STRICT = "strict", "At once, in calls of their own, so that lessons join the update of their own step (the paper)."
    OVERLAP = (
        "overlap", "Analyses in the same engine call as the next batch's rollouts, and their replays in the call after "
        "it; lessons join the update of the step in which they are complete.",
    )  # fmt: skip


class EarlyEnd(Choice):
    """Analyses whose sampling is ended early."""

    NEVER = "never", "None."
    CERTAIN = "certain", "Those that cannot be parsed any more: one word 8 times in a row, or too long to be read."
    LIKELY = "likely", "Also those that repeat themselves, or have no further section by half of `analysis_max_tokens`."


class LessonNormalization(Choice):
    """Divisor of the summed NLL of a step's lessons."""

    KEPT = "kept", "The number of kept meta-experiences (the paper's mean)."
    PROMPTS = "prompts", "The number of prompts, so that a few survivors weigh little."


class CollapseAction(Choice):
    """Response to metrics that show training going wrong."""

    WARN = "warn", "Log a warning."
    LOWER_LAMBDA = "lower_lambda", "Log a warning, and halve `mel_weight` where less weight on the lessons can help."
    STOP = "stop", "Stop the run with an error that names the metrics."


@dataclass(frozen=True, slots=True)
class BankOptions:
    """Options of a bank; fields have the meaning of the `MELConfig` options `bank_<field>`."""

    size: int = 512
    retrieval: str = "lexical"
    teach_from: float = 0.5
    retire_below: float = 0.0
    limit: int = 8
    settled: float | None = 1.0
    settled_nats: float | None = 2.0

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of range, by the name of its `MELConfig` option."""
        for name in ("size", "limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"bank_{name}={getattr(self, name)} must be at least 1. Raise bank_{name}.")
        for name, value in (("teach_from", self.teach_from), ("retire_below", self.retire_below)):
            if not math.isfinite(value):
                raise ConfigError(f"bank_{name}={value} is no finite number. Set bank_{name} to one.")
        if self.retire_below > self.teach_from:
            problem = f"bank_retire_below={self.retire_below} is above bank_teach_from={self.teach_from}"
            raise ConfigError(f"{problem}: a lesson would be retired while it teaches. Lower bank_retire_below.")
        if self.settled is not None and not 0 < self.settled <= 1:
            raise ConfigError(f"bank_settled={self.settled} must be a share in (0, 1], or null to ignore words.")
        if self.settled_nats is not None and not self.settled_nats > 0:
            raise ConfigError(f"bank_settled_nats={self.settled_nats} must be above 0, or null to ignore forks.")


Message = dict[str, Any]
Prompt = str | list[Message]
"""Question of a dataset row: plain text, or a conversation (`[{"role": ..., "content": ...}, ...]`)."""


class Verdict(StrEnum):
    """Result of verifying one completion."""

    RIGHT = "right"
    """The final answer matches the reference."""
    WRONG = "wrong"
    """There is no final answer, or it does not match."""
    ABSTAIN = "abstain"
    """Cannot be judged (unusable reference, deadline passed, verifier error): no reward, no gradient, no pair."""


class Finish(StrEnum):
    """Reason the engine stopped a sequence."""

    STOP = "stop"
    """An end-of-sequence token was sampled; it is the last id."""
    LENGTH = "length"
    """`max_new_tokens` was reached."""
    ENDED = "ended"
    """It was ended early, since nothing useful could follow."""


class Status(StrEnum):
    """Last stage a meta-experience reached. Every value but KEPT is a reason for dropping it."""

    UNPARSED = "unparsed"
    """The analysis does not have the three parts."""
    LEAKED = "leaked"
    """It contains the reference answer."""
    NOT_LIFTING = "not_lifting"
    """It does not make the group's right rollouts likelier than the wrong ones."""
    REPLAY_FAILED = "replay_failed"
    """The replay did not meet the criterion."""
    KEPT = "kept"
    """It is trained on."""


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text."""

    start: int
    end: int

    def of(self, text: str) -> str:
        """Return the characters of `text` in the span."""
        return text[self.start : self.end]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of a prompt and its verdict."""

    index: int
    """Row of the completion in this step's generation batch, over all ranks (counter of the seeds)."""
    completion_ids: tuple[int, ...]
    text: str
    """Decoded without special tokens."""
    verdict: Verdict
    finish: Finish = Finish.STOP
    reward: float = float("nan")
    """Weighted sum of the reward functions; NaN when all abstained."""


@dataclass(frozen=True, slots=True)
class Group:
    """All completions of one prompt in one step."""

    prompt: Prompt
    prompt_hash: str
    rollouts: tuple[Rollout, ...]
    answer: str | None = None
    """Reference answer y*; None when the verdict comes from a reward function."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The other dataset columns of the row, for verifiers and reward functions."""
    prompt_end: str = ""
    """End of the rendered prompt, where a chat template may open a thought for the model."""

    @property
    def right(self) -> tuple[Rollout, ...]:
        """Y+, in sampling order."""
        return tuple(r for r in self.rollouts if r.verdict is Verdict.RIGHT)

    @property
    def wrong(self) -> tuple[Rollout, ...]:
        """Y-, in sampling order."""
        return tuple(r for r in self.rollouts if r.verdict is Verdict.WRONG)

    @property
    def is_mixed(self) -> bool:
        """True when the group has both a right and a wrong completion, so that a lesson can be drawn from it."""
        return bool(self.right) and bool(self.wrong)


@dataclass(frozen=True, slots=True)
class Pair:
    """A right and a wrong completion of one prompt."""

    group: Group
    right: Rollout
    wrong: Rollout
    common_prefix_tokens: int
    """Number of leading token ids the two share: the position of their first difference."""
    index: int = 0
    """Position of the pair among this step's pairs, over all ranks (counter of the seeds)."""


@dataclass(frozen=True, slots=True)
class Analysis:
    """Text that the policy wrote about a pair, as sampled: M before parsing."""

    pair: Pair
    context_ids: tuple[int, ...]
    """C_retro = [I, x, y+, y-] as tokens: the exact prompt the analysis was sampled from."""
    analysis_ids: tuple[int, ...]
    text: str
    """Prefill (if any) + decoded `analysis_ids`, without special tokens."""
    finish: Finish
    nll_nats: float
    """Mean over tokens of -log pi(M_t | C_retro, M_<t) when it was sampled; NaN if the engine gave no log-probs."""
    templates_version: str = ""
    """Identifies the prompt's texts; empty when unknown."""


@dataclass(frozen=True, slots=True)
class MetaExperience:
    """Parsed analysis, M = (s*, C, H)."""

    bifurcation: str
    critique: str
    heuristic: str

    def as_text(self) -> str:
        """Return the three parts under their headings, as they are leak-checked, shown and replayed."""
        return f"## Bifurcation\n{self.bifurcation}\n\n## Critique\n{self.critique}\n\n## Heuristics\n{self.heuristic}"


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Findings of the leak guard in a meta-experience. Empty `reasons` = clean."""

    reasons: tuple[str, ...] = ()
    """One short sentence per finding: rule, part and the offending span."""
    redacted: MetaExperience | None = None
    """Meta-experience without the offending spans; None unless the policy is `redact` and that made it clean."""

    @property
    def leaks(self) -> bool:
        """True when there is a finding."""
        return bool(self.reasons)


@dataclass(frozen=True, slots=True)
class Replay:
    """Verdicts of re-attempting the question with M in the prompt, and of the control without it."""

    verdicts: tuple[Verdict, ...]
    texts: tuple[str, ...]
    control_verdicts: tuple[Verdict, ...] = ()

    @property
    def solved_rate(self) -> float:
        """Share of attempts with M that were right; 0 when there was none."""
        return sum(v is Verdict.RIGHT for v in self.verdicts) / max(1, len(self.verdicts))

    @property
    def control_rate(self) -> float | None:
        """Share of attempts without M that were right; None when no control was run."""
        if not self.control_verdicts:
            return None
        return sum(v is Verdict.RIGHT for v in self.control_verdicts) / len(self.control_verdicts)

    @property
    def uplift(self) -> float | None:
        """`solved_rate - control_rate` in [-1, 1]; None when no control was run."""
        return None if self.control_rate is None else self.solved_rate - self.control_rate


@dataclass(frozen=True, slots=True)
class Experience:
    """Meta-experience with its analysis, checks and result: one row of the store."""

    step: int
    """Number of optimizer steps before it was complete."""
    analysis: Analysis
    status: Status
    reason: str = ""
    """Reason for dropping it, in one sentence; empty when kept."""
    parsed: MetaExperience | None = None
    leak: LeakReport | None = None
    replay: Replay | None = None
    quote: Span | None = None
    """Characters of the wrong solution that the bifurcation quotes; None when it quotes none, or is not parsed."""
    shift_nats: float | None = None
    """Lift by M of the group's right rollouts minus that of its wrong ones; None when not scored."""
    staleness_steps: int = 0
    """Optimizer steps from the sampling of its rollouts to `step`; 0 with the strict schedule."""
    staleness_versions: int = 0
    """Updates of the weights among them: steps that were skipped do not count."""

    @property
    def rollouts_step(self) -> int:
        """Number of optimizer steps before its rollouts were sampled."""
        return self.step - self.staleness_steps

    @property
    def text(self) -> str:
        """M as text, redacted where the guard did so. Raises: AssertionError when it was not parsed."""
        parsed = (self.leak.redacted if self.leak else None) or self.parsed
        assert parsed is not None, "only a parsed meta-experience has a text"
        return parsed.as_text()


@dataclass(frozen=True, slots=True)
class Lesson:
    """A text to be scored or trained on: log pi(target_ids | context_ids)."""

    experience_id: int
    """Row id of its meta-experience in the store; 0 for none."""
    context_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    way: int = 0
    """Number of the internalisation that made it, within a combination."""
    scale: float = 1.0
    """Lessons of the batch over lessons of its way: turns the mean over all into the mean over those of its way."""


@dataclass(frozen=True, slots=True)
class BankLesson:
    """A kept heuristic with its running score (`lessons/bank`)."""

    id: int
    """Row id of its first experience in this run's store; negative for a lesson of another run."""
    heuristic: str
    """Text of H."""
    question_text: str
    """Question of its first experience."""
    score: float
    """Sum over its experiences and examinations, each in [-1, 1]."""
    votes: int
    """Number of experiences and examinations."""
    retired: bool
    """The score is below `retire_below`; it neither teaches nor is examined, until the same rule is kept again."""
    step: int
    """Optimizer step of its first experience, from 1; 0 for a lesson of another run."""
