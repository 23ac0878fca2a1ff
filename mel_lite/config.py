"""MELConfig: TRL's GRPOConfig with the options of Meta-Experience Learning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from mel_lite.errors import ConfigError, check_choice
from mel_lite.option_checks import ALSO_ZERO, DEFAULTS, check_estimator, check_schedule, check_trl_values
from mel_lite.trl_compat import released_grpo_config
from mel_lite.types import (
    Algorithm,
    BankOptions,
    Choice,
    CollapseAction,
    EarlyEnd,
    LeakPolicy,
    LessonNormalization,
    PairStrategy,
    ReplayCriterion,
    Schedule,
)
from mel_lite.verify.thoughts import parse_tags
from mel_lite.verify.verifiers import BUILT_IN, PassedFunction, callable_name

if TYPE_CHECKING:
    from trl import GRPOConfig
else:
    GRPOConfig = released_grpo_config()

WHOLE_DISTRIBUTION: dict[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)
}  # fmt: skip
"""Sampling options with the values that leave the policy's distribution whole; the first is the default."""
_INTERNALISATION = "analysis"
_OLD_VALUES = ("analysis", "experience")
"""Values of the deprecated `mel_train_on`."""


def _option(default: Any, help_text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help_text} | ({"choices": choices} if choices else {}))


def _choice(default: Choice, help_text: str) -> Any:
    """Return the field of an option with a fixed set of values; its help text ends with what each value means."""
    choices = type(default)
    return _option(default.value, f"{help_text} {_meanings(choices)}", tuple(choice.value for choice in choices))


def _meanings(choices: type[Choice]) -> str:
    return " ".join(f"`{choice}`: {choice.__doc__}" for choice in choices)


@dataclass
class MELConfig(GRPOConfig):
    """Options of `MELTrainer`: everything `trl.GRPOConfig` has, plus the fields below.

    Raises: ConfigError (a ValueError) for a value outside its range, naming field, value, reason and fix.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "internalisation", "internalisation_options"]  # noqa: RUF012

    algorithm: str = _choice(Algorithm.MEL, "Policy term of the loss.")
    meta_experience: bool | None = _option(
        None, "Learn from meta-experiences next to the policy term. None: with `mel` only."
    )
    verifier: str | None | Callable = _option(  # type: ignore[type-arg]  # noqa: RUF009, RUF036
        None,
        f"Verifier that calls a completion right or wrong: {', '.join(BUILT_IN)}, a dotted path to "
        "`verifier(completion, answer) -> right | wrong | abstain`, or in Python the function itself. None: math if "
        "the dataset has an `answer` or `solution` column, else a completion is right when its reward reaches "
        "`verifier_threshold`.",
    )
    think_tags: list[str] | None = _option(  # noqa: RUF009
        None,
        "Tags around a completion's thoughts, each as `START END`: built-in verifiers read what follows the last END, "
        "and nothing if a START has no END. None: those of the usual reasoning models, such as `<think> </think>` and "
        "`[THINK] [/THINK]`. An empty list: the whole completion is the answer.",
    )
    verifier_threshold: float = _option(
        1.0, "With no verifier and no answer column: least weighted reward that counts as right."
    )
    verifier_workers: int = _option(2, "Worker processes that run the verifier.")
    verifier_deadline_s: float = _option(1.0, "Seconds a verifier may take for one answer before it is killed.")
    mel_weight: float = _option(1.0, "lambda: weight of the internalisation's loss next to the policy loss.")
    mel_normalization: str = _choice(LessonNormalization.KEPT, "Divisor of a step's meta-experience NLL.")
    internalisation: str | None | dict = _option(  # type: ignore[type-arg]  # noqa: RUF009, RUF036
        _INTERNALISATION,
        "How lessons enter the weights: a name in `mel_lite.lessons.internalise.INTERNALISATIONS` (listed in "
        "docs/configuration.md), a dotted path to a subclass of `mel_lite.lessons.internalise.Internalisation`, or "
        "several with their weights, such as `{analysis: 0.1, distill: 0.3}`, each multiplied by `mel_weight`.",
    )
    internalisation_options: str | None | dict = _option(  # type: ignore[type-arg]  # noqa: RUF009, RUF036
        None,
        "Options of the internalisation, such as `{context: sibling}` for `distill` (docs/internalisation.md). Of "
        "several, by name: `{distill: {context: sibling}}`.",
    )
    token_credit_rollouts: int = _option(
        8,
        "Rollouts per step whose token credit (`credit`, `distill`) is stored, those of kept lessons first; 0 = none.",
    )
    mel_schedule: str = _choice(
        Schedule.STRICT, "Time at which analyses and replays are sampled; results differ by the staleness alone."
    )
    max_staleness_steps: int | None = _option(
        None,
        "With `overlap`: most optimizer steps from the rollouts of a lesson to the update it joins, which bounds the "
        "attempts of `solved_once`. None: no bound.",
    )
    mel_decay_steps: int = _option(
        0, "Optimizer steps over which lambda falls linearly to 0 from the start of the run; 0 = it stays."
    )
    mel_train_on: str | None = _option(None, "Deprecated name of `internalisation`.")
    pairs_per_group: int = _option(1, "Right/wrong pairs drawn from a mixed group; -1 = all |Y+| x |Y-|.")
    pair_strategy: str = _choice(PairStrategy.LONGEST_PREFIX, "Which pairs of a group are drawn first.")
    analysis_max_tokens: int = _option(1024, "Longest analysis, in tokens.")
    end_hopeless_analyses: str | None = _option(
        None,
        "Analyses that are ended early; a vLLM server finishes them all. None: `certain` with `overlap`, "
        f"else `never`. {_meanings(EarlyEnd)}",
        tuple(choice.value for choice in EarlyEnd),
    )
    analysis_temperature: float | None = _option(None, "Temperature of analysis and replay; None = `temperature`.")
    max_context_tokens: int | None = _option(
        None, "Longest C_retro prompt in tokens; longer solutions are trimmed. None = what the model's context leaves."
    )
    mark_fork: bool = _option(
        True,
        "Mark the first differing line of both solutions in the analysis prompt, and ask for the wrong step as an "
        "exact quote. False: the paper's prompt.",
    )
    leak_policy: str = _choice(LeakPolicy.REJECT, "Treatment of a meta-experience that contains the answer.")
    replay_attempts: int = _option(1, "k: attempts at the question with the meta-experience in the prompt.")
    replay_control: bool = _option(
        False,
        "Also attempt it k times without, on the same seeds, to know the uplift (always on for `uplift` criteria).",
    )
    replay_criterion: str = _choice(ReplayCriterion.SOLVED, "Proof that keeps a meta-experience.")
    lessons_from: str | None = _option(
        None, "Run or checkpoint folder whose lessons the bank starts with. None: it starts empty."
    )
    bank_size: int = _option(512, "Maximum lessons in the bank; the one of lowest score leaves first, then the oldest.")
    bank_retrieval: str = _option(
        "lexical",
        "Retrieval of lessons for a question: `lexical` (BM25 over the questions they came from, where the words of "
        "their rules weigh most), or a dotted path to a function `(question, lessons) -> lessons`, best first.",
    )
    bank_limit: int = _option(8, "Maximum lessons of the bank per question.")
    bank_teach_from: float = _option(0.5, "Least score of a lesson that teaches. One kept meta-experience gives 1.")
    bank_retire_below: float = _option(0.0, "Score below which a lesson is retired, until the same rule is kept again.")
    bank_settled: float | None = _option(
        1.0, "With a bank, write no lesson for a question of whose words known lessons mention at least this share."
    )
    bank_settled_nats: float | None = _option(
        2.0, "The same for a pair at whose fork the bank's notes favor the right token by this log ratio, in nats."
    )
    engine_url: str | None = _option(
        None,
        "Address of a vLLM server that samples, such as `http://localhost:8000` (docs/engines.md). `mel-lite train` "
        "also needs `model.engine: vllm-server`. None: the model in this process samples.",
    )
    engine_exchange: str | None = _option(
        None,
        "Folder for adapters that the server at `engine_url` sees under the same path. None = `engine_adapters` in the "
        "output folder.",
    )
    max_cache_tokens: int | None = _option(
        None,
        "Maximum KV-cache tokens while sampling; further sequences are queued. A sequence counts at full length. "
        "Limits the memory of generation, not its result. None = 64 sequences.",
    )
    max_micro_batch_tokens: int | None = _option(
        None,
        "Maximum tokens, padding included, per forward/backward pass. Rollouts and lessons of a micro-batch "
        "are grouped by length and taken in parts of that size; the gradient is that of the whole. A longer row is a "
        "part of its own. None = no bound, until memory runs out.",
    )
    skip_zero_advantage: bool | None = _option(
        None,
        "Leave completions of advantage 0 (in groups all right or all wrong) out of the update's forward pass. Same "
        "gradient; entropy and clip ratios are over the others. None: without KL, entropy or load-balancing terms.",
    )
    share_prompts: bool | None = _option(
        None,
        "Compute a prompt's tokens once for all its completions, and pad no row, in forward/backward passes and in "
        "transformers' sampling. Same result. None: on CPUs, for models with full attention and no dropout.",
    )
    merge_to_sample: bool | None = _option(
        None,
        "Sample with the transformers engine from a temporary copy of the weights with the adapter added in, packed "
        "for oneDNN. Same distribution. None: on CPUs, with float32 weights and plain LoRA.",
    )
    templates: str | None = _option(
        None, "YAML file overriding the analysis and replay prompts, or `demo` for the short ones of the demo."
    )
    grad_norm_every: int = _option(
        0, "Every N optimizer steps, measure the gradient norms of both loss terms and their cosine (0 = never)."
    )
    probe_max_diff: float | None = _option(
        0.05,
        "Largest mean difference in nats per token between the log-probs of the engine and those of the trainer on the "
        "same completions; the run stops above it. Measured at the start, after the first update and after a resume. "
        "None: measure nothing.",
    )

    on_collapse: str = _choice(
        CollapseAction.WARN,
        "Response when a metric shows training going wrong: falling reward or evaluation, shrinking completions, "
        "memorized or leaking meta-experiences, nothing learned.",
    )
    max_idle_steps: int = _option(
        0,
        "Stop after this many consecutive optimizer steps with nothing to learn from (no completion has an advantage, "
        "no meta-experience was kept or taught), with a warning after a fifth of them. 0 = only warn. The presets set "
        "50.",
    )
    dynamic_sampling_rounds: int = _option(
        0,
        "Rounds in which groups whose completions all earn the same reward give way to other prompts before training, "
        "at most so many per batch; 0 = none.",
    )
    rest_after: int = _option(
        0, "A prompt rests after so many groups in a row that were all right, or all without a right one; 0 = never."
    )
    rest_batches: int = _option(
        10, "Generation batches of a prompt's first rest; each next one is twice as long, up to 32 times."
    )
    max_generated_tokens: int | None = _option(
        None,
        "Stop after the last update on the batch by which this many tokens were generated: rollouts, analyses and "
        "replays. None: no limit but `max_steps`.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_values()
        self._rename_deprecated()
        self._check_skipping()
        check_estimator(self)
        check_schedule(self)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as JSON can hold them: a function by its name."""
        options = dict(super().to_dict())
        if callable(self.verifier):
            options["verifier"] = callable_name(self.verifier)
        return options

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | ({"verifier": PassedFunction(self.verifier)} if callable(self.verifier) else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.get("verifier")
        self.__dict__.update(state | ({"verifier": kept.function} if isinstance(kept, PassedFunction) else {}))

    def _rename_deprecated(self) -> None:
        if self.mel_train_on is None:
            return
        if self.mel_train_on not in _OLD_VALUES:
            raise ConfigError(
                f"mel_train_on={self.mel_train_on!r} is not one of {', '.join(_OLD_VALUES)}. Set internalisation."
            )
        if self.internalisation not in (_INTERNALISATION, self.mel_train_on):
            raise ConfigError(
                f"mel_train_on={self.mel_train_on!r} with internalisation={self.internalisation!r}: both name how "
                "lessons enter the weights. Remove mel_train_on, the deprecated name."
            )
        warnings.warn(
            f"mel_train_on is deprecated. Set internalisation={self.mel_train_on!r} instead.",
            FutureWarning,
            stacklevel=4,
        )
        self.internalisation, self.mel_train_on = self.mel_train_on, None

    def _check_values(self) -> None:
        for option in fields(self):
            if option.name in MELConfig.__annotations__ and "choices" in option.metadata:
                if (value := getattr(self, option.name)) is not None or option.default is not None:
                    check_choice(option.name, value, option.metadata["choices"])
        for name, least in (
            ("analysis_max_tokens", 16), ("replay_attempts", 1), ("verifier_workers", 1), ("rest_batches", 1),
            ("grad_norm_every", 0), ("max_idle_steps", 0), ("mel_decay_steps", 0), ("dynamic_sampling_rounds", 0),
            ("rest_after", 0), ("token_credit_rollouts", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}. Raise {name}.")
        if self.verifier is not None and not (isinstance(self.verifier, str) or callable(self.verifier)):
            raise ConfigError(
                f"verifier={self.verifier!r} is a {type(self.verifier).__name__}. Set a name ({', '.join(BUILT_IN)}), "
                "a dotted path, or a function (completion, answer)."
            )
        if not isinstance(self.internalisation_options, dict | None):
            raise ConfigError(
                f"internalisation_options={self.internalisation_options!r} is a "
                f"{type(self.internalisation_options).__name__}. Set a mapping such as {{context: sibling}}."
            )
        parse_tags(self.think_tags)
        check_trl_values(self)
        self._check_bank()
        self._check_sampling()
        if self.trust_remote_code or (self.model_init_kwargs or {}).get("trust_remote_code"):
            raise ConfigError(
                "trust_remote_code=True would run code from a model's repository, which no option of MEL-Lite turns "
                "on. Read that code, load the model yourself, and give MELTrainer the object."
            )
        if self.max_cache_tokens is not None and self.max_cache_tokens < 1:
            raise ConfigError(f"max_cache_tokens={self.max_cache_tokens} must be positive, or null for no bound.")
        for name in ("max_micro_batch_tokens", "max_generated_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ConfigError(f"{name}={limit} must be positive, or null for no bound.")
        if self.probe_max_diff is not None and not self.probe_max_diff > 0:
            raise ConfigError(f"probe_max_diff={self.probe_max_diff} must be positive nats, or null for no probe.")
        if self.pairs_per_group < 1 and self.pairs_per_group != -1:
            raise ConfigError(f"pairs_per_group={self.pairs_per_group} must be 1 or more, or -1 for all pairs.")
        if not self.mel_weight >= 0:
            raise ConfigError(
                f"mel_weight={self.mel_weight} must be 0 or more: a negative weight unlearns the lessons."
            )
        if not self.verifier_deadline_s > 0:
            raise ConfigError(f"verifier_deadline_s={self.verifier_deadline_s} must be positive seconds.")

    def _check_bank(self) -> None:
        _ = self.bank_options  # checks the values
        if self.lessons_from is not None and not self.with_meta_experience:
            raise ConfigError(
                f"lessons_from={self.lessons_from!r} with algorithm={self.algorithm!r}, which uses no lessons. Set "
                "algorithm='mel' or meta_experience=True, or unset lessons_from."
            )

    def _check_sampling(self) -> None:
        """Warn when rollouts come from another distribution than the one trained; RFT trains on texts of any."""
        if self.algorithm == Algorithm.RFT:
            return
        wanted = {name: getattr(self, name) for name in WHOLE_DISTRIBUTION} | {
            name: value for name, value in (self.generation_kwargs or {}).items() if name in WHOLE_DISTRIBUTION
        }
        for name, value in wanted.items():
            if value not in WHOLE_DISTRIBUTION[name]:
                warnings.warn(
                    f"{name}={value} changes the sampling distribution, but log-probs are of the whole one: importance "
                    "ratios and the gradient are off by the mass that is cut (logged as mel/cut_mass). Leave "
                    f"{name} unset ({WHOLE_DISTRIBUTION[name][0]!r}) for an unbiased gradient.",
                    UserWarning,
                    stacklevel=5,
                )

    def _check_skipping(self) -> None:
        """Only a completion without any gradient may be left out."""
        if self.skip_zero_advantage and (name := self.gradient_without_advantage) is not None:
            reason = f"{ALSO_ZERO[name]} also needs completions of advantage 0"
            raise ConfigError(f"skip_zero_advantage=True with {name}={getattr(self, name)}: {reason}. Unset one.")

    @property
    def gradient_without_advantage(self) -> str | None:
        """The first option by which a completion of advantage 0 has a gradient; None if there is none."""
        return next((name for name in ALSO_ZERO if getattr(self, name) != DEFAULTS[name]), None)

    @property
    def estimator(self) -> str:
        """The policy term: `grpo`, `reinforce++` or `rft`."""
        return Algorithm.GRPO.value if self.algorithm == Algorithm.MEL else self.algorithm

    @property
    def with_meta_experience(self) -> bool:
        """True when lessons are written and trained on."""
        return self.algorithm == Algorithm.MEL if self.meta_experience is None else self.meta_experience

    @property
    def overlaps(self) -> bool:
        """True when analyses and replays are sampled with later rollouts."""
        return self.with_meta_experience and self.mel_schedule == Schedule.OVERLAP

    @property
    def early_end(self) -> EarlyEnd:
        """Analyses whose sampling is ended early."""
        default = EarlyEnd.CERTAIN if self.mel_schedule == Schedule.OVERLAP else EarlyEnd.NEVER
        return default if self.end_hopeless_analyses is None else EarlyEnd(self.end_hopeless_analyses)

    @property
    def steps_per_batch(self) -> float:
        """Optimizer steps of a generation batch."""
        return self.steps_per_generation * self.num_iterations / self.gradient_accumulation_steps

    @property
    def bank_options(self) -> BankOptions:
        """The options `bank_*`. Raises: ConfigError for values out of range."""
        return BankOptions(**{option.name: getattr(self, f"bank_{option.name}") for option in fields(BankOptions)})

    @property
    def needs_control(self) -> bool:
        """True when replays also run without the meta-experience."""
        return self.replay_control or ReplayCriterion(self.replay_criterion).compares

    def mel_weight_at(self, step: float) -> float:
        """Return lambda after `step` optimizer steps: `mel_weight`, less its decay."""
        left = max(0.0, 1.0 - step / self.mel_decay_steps) if self.mel_decay_steps else 1.0
        return self.mel_weight * left
