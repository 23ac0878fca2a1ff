"""Prompts of the lesson stages (analysis, replay, control) as token ids.

Text from a model or a dataset is inserted in one pass of plain replacement, with the tokenizer's control tokens broken
up. It therefore cannot fill a placeholder, or open or close a chat turn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mel_lite.data import demo_tasks
from mel_lite.data.cells import NO_USER_TURN, has_user_turn
from mel_lite.errors import ConfigError, DataError
from mel_lite.lessons.fork import find_fork, fork_tokens, mark_fork, unit_of
from mel_lite.models.chat import neutralize, question_text, render, turn_text
from mel_lite.text import suggest
from mel_lite.types import Group, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE_PARTING_TOKENS = 48
"""Untrimmed tokens before the first difference."""
REST_TOKENS = 96
"""Untrimmed tokens after it, and the same number at the end (the final answer)."""
DEMO = "demo"
"""Name of the packaged templates of the demo."""
_TRIM_ROUNDS = 8

_ANALYSIS_SYSTEM = (
    "You study your own reasoning. Below are a question and two solutions you wrote. Their labels judge the final "
    "answer only; the steps of either may wander."
)
_ANALYSIS_USER = """\
Question:
{question}

Solution with an INCORRECT final answer:
<incorrect>
{wrong}
</incorrect>

Solution with the CORRECT final answer:
<correct>
{right}
</correct>

Find out why they part. Write these four sections; none may be missing:

## Bifurcation
The step at which the incorrect solution leaves the right path, and the habit of thought behind it. Look deeper than \
slips of arithmetic.

## Critique
The latent defect (confused concepts, rigid method, missed case, misleading hunch) and the constraint it violates. \
What protected the correct solution, or what made it stop and correct itself. What it saw that the other did not.

## Reflection
As "I": what I review, what I understand now, what I will do.

## Heuristics
Named rules for other problems: "If ..., then ..." or "When ..., I must check ...". No number, name, variable or \
answer of this problem may appear in them.
"""
_FORK_NOTE = """\
The first line in which the two solutions differ begins with `{mark}` in each. Name the wrong step of the incorrect \
solution in the bifurcation: quote its line exactly, in backticks, without that mark.
"""
_REPLAY_USER = """\
You have studied this question before. These are your own notes, with pitfalls and rules to follow:

<notes>
{experience}
</notes>

Take them in as your experience. Then reason for yourself, in full, and answer.

{question}"""


@dataclass(frozen=True, slots=True)
class Templates:
    """Instructions around the text of the model and the dataset; `{name}` marks where that text is inserted."""

    version: str = "1"
    """Identifies these texts in the store."""
    analysis_system: str = _ANALYSIS_SYSTEM
    analysis_user: str = _ANALYSIS_USER
    """Instruction I of the method, with `{question}`, `{wrong}` and `{right}`."""
    analysis_prefill: str = "## Bifurcation\n"
    """Beginning of every analysis: part of the context, not sampled and not trained on."""
    replay_user: str = _REPLAY_USER
    """Last user turn of a replay, with `{experience}` and `{question}`."""
    trimmed_shared: str = "[... {count} tokens that both solutions share are left out ...]"
    """Replaces what was cut out of the common prefix."""
    trimmed_rest: str = "[... {count} tokens are left out ...]"
    """Replaces what was cut out after the point where the solutions part."""
    fork_mark: str = "> "
    """Precedes the first differing line of each solution, where `mark_fork` is on."""
    fork_note: str = _FORK_NOTE
    """Follows `analysis_user` there, with `{mark}`; empty: nothing follows."""

    def instructions(self, *, marked: bool) -> str:
        """Return the instruction of an analysis, with placeholders for its texts."""
        if not marked or not self.fork_note:
            return self.analysis_user
        return f"{self.analysis_user.rstrip()}\n\n{_fill(self.fork_note, mark=self.fork_mark.strip())}"

    def version_of(self, *, marked: bool) -> str:
        """Return the version of the texts in use."""
        return f"{self.version}+fork" if marked else self.version

    def texts(self, *, marked: bool) -> tuple[str, ...]:
        """Return the version and the texts in use; without the mark, those of releases that had none."""
        unused = () if marked else ("fork_mark", "fork_note")
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in unused)


DEFAULT_TEMPLATES = Templates()

_PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "analysis_user": ("question", "wrong", "right"),
    "replay_user": ("experience", "question"),
    "trimmed_shared": ("count",),
    "trimmed_rest": ("count",),
    "fork_note": ("mark",),
}


class UnfitPair(Exception):
    """Raised when no lesson can be drawn from a pair; the message is the reason."""


def load_templates(path: str | None) -> Templates:
    """Load templates: the defaults, with the fields that a YAML file sets replaced. None returns the defaults.

    `demo` names the packaged file of the demo.

    Without a `version` in the file, the version is `custom-<hash of the texts>`.

    Raises: ConfigError for a file that cannot be read, an unknown field, a value that is not text, and a placeholder
    that is missing or unknown.
    """
    if path is None:
        return DEFAULT_TEMPLATES
    if path == DEMO:
        path = demo_tasks.TEMPLATES
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"templates={path!r} cannot be read: {error}. Give a YAML file of texts.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"templates={path!r} has no fields. Write lines like `analysis_system: |` and the text.")
    known = [field.name for field in dataclasses.fields(Templates)]
    for name, value in loaded.items():
        if name not in known:
            raise ConfigError(f"templates={path!r}: unknown field {name!r}.{suggest(name, known)}")
        if not isinstance(value, str):
            raise ConfigError(f"templates={path!r}: {name} is {value!r}, not text. Put it in quotes.")
        _check_placeholders(path, name, value)
    mark = loaded.get("fork_mark", DEFAULT_TEMPLATES.fork_mark)
    if not mark.strip() or len(mark.splitlines()) > 1:
        raise ConfigError(
            f"templates={path!r}: fork_mark is {mark!r}, but it must be visible text on one line. For prompts without "
            "a mark, set mark_fork=False."
        )
    if "version" not in loaded:
        digest = hashlib.blake2b(repr(sorted(loaded.items())).encode(), digest_size=4).hexdigest()
        loaded["version"] = f"custom-{digest}"
    return dataclasses.replace(DEFAULT_TEMPLATES, **loaded)


def _check_placeholders(path: str, name: str, text: str) -> None:
    expected = _PLACEHOLDERS.get(name, ())
    if name == "fork_note" and not text:
        return
    # `\boxed{answer}` is LaTeX, not a placeholder: there is a letter before the brace.
    for found in re.findall(r"(?<![A-Za-z])\{([a-z_]+)\}", text):
        if found not in expected:
            hint = suggest(found, expected) or f" {name} takes no placeholders; remove the braces."
            raise ConfigError(f"templates={path!r}: {name} has the unknown placeholder {{{found}}}.{hint}")
    for wanted in expected:
        if "{" + wanted + "}" not in text:
            raise ConfigError(f"templates={path!r}: {name} is missing the placeholder {{{wanted}}}. Add it.")


def _fill(template: str, **values: str) -> str:
    """Replace the placeholders by `values` in one pass, so that values are not searched for placeholders."""
    return re.sub("|".join(r"\{" + name + r"\}" for name in values), lambda match: values[match[0][1:-1]], template)


def question_prompt(
    group: Group, tokenizer: PreTrainedTokenizerBase, *, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the prompt of the group's rollouts, which is also the prompt of the control without M."""
    return render(group.prompt, tokenizer, chat_template_kwargs=chat_template_kwargs)


def replay_prompt(
    group: Group,
    experience_text: str,
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Return [x, M]: the group's prompt with M as the model's own notes in its last user turn.

    Raises: DataError for a conversation without a user turn.
    """
    notes = neutralize(experience_text.strip(), tokenizer)
    if isinstance(group.prompt, str):
        prompt: Prompt = _fill(templates.replay_user, experience=notes, question=group.prompt)
        return render(prompt, tokenizer)
    turns = [dict(message) for message in group.prompt]
    users = [turn for turn in turns if turn["role"] == "user"]
    if not users:
        raise DataError(f"prompt {group.prompt_hash} has no message with role 'user' to ask the question. Add one.")
    users[-1]["content"] = _fill(templates.replay_user, experience=notes, question=turn_text(users[-1]))
    return render(turns, tokenizer, chat_template_kwargs=chat_template_kwargs)


def analysis_prompt(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
    *,
    max_context_tokens: int,
    mark: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Return C_retro = [I, x, y+, y-] and the prefill, in at most `max_context_tokens` tokens.

    Long solutions lose the middle of their common prefix first, then the middle of the rest. The tokens around the
    point where they part and the end of each solution are always kept. A plain-text question gives a plain-text prompt.

    Args: `mark`: mark the first differing line of each solution (`MELConfig.mark_fork`).
    Raises: UnfitPair when cutting everything that may be cut is not enough, and for a conversation without a user turn,
        into which no lesson could be put.
    """
    if not has_user_turn(pair.group.prompt):
        raise UnfitPair(f"the prompt {NO_USER_TURN}")
    unit = unit_of(pair.right.text.strip(), pair.wrong.text.strip())

    def build(wrong: str, right: str) -> tuple[int, ...]:
        wrong, right = wrong.strip(), right.strip()
        if mark:
            fork = find_fork(right, wrong, unit=unit)
            wrong = mark_fork(wrong, fork.wrong, templates.fork_mark)
            right = mark_fork(right, fork.right, templates.fork_mark)
        user = _fill(
            templates.instructions(marked=mark),
            question=neutralize(question_text(pair.group.prompt), tokenizer, special_only=True).strip(),
            wrong=neutralize(wrong, tokenizer).strip(),
            right=neutralize(right, tokenizer).strip(),
        )
        if isinstance(pair.group.prompt, str):
            return render(f"{templates.analysis_system}\n\n{user}\n", tokenizer, prefill=templates.analysis_prefill)
        messages = [{"role": "system", "content": templates.analysis_system}, {"role": "user", "content": user}]
        return render(
            messages, tokenizer, prefill=templates.analysis_prefill, chat_template_kwargs=chat_template_kwargs
        )

    whole = build(pair.wrong.text, pair.right.text)
    if len(whole) <= max_context_tokens:
        return whole
    fitting = _trim_to_fit(pair, len(whole), max_context_tokens, build, tokenizer, templates, marked=mark)
    if fitting is None:
        raise UnfitPair(
            f"the analysis prompt has {len(whole)} tokens, {max_context_tokens} fit, and the rest may not be trimmed"
        )
    return fitting


def _trim_to_fit(
    pair: Pair,
    tokens: int,
    max_tokens: int,
    build: Callable[[str, str], tuple[int, ...]],
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
    *,
    marked: bool,
) -> tuple[int, ...] | None:
    """Return the prompt with cuts in the solutions, or None when it cannot fit."""
    right_fork, wrong_fork = fork_tokens(pair, tokenizer if marked else None)
    remove_tokens = 0
    for _ in range(_TRIM_ROUNDS):
        # Markers cost tokens, and decoded pieces may tokenize to a few tokens more or less: build, measure, repeat.
        remove_tokens += tokens - max_tokens
        cuts = _plan_cuts(pair, right_fork, wrong_fork, remove_tokens)
        if cuts is None:
            return None
        shared, wrong_rest, right_rest = cuts
        parting = pair.common_prefix_tokens
        ids = build(
            _trimmed(pair.wrong.completion_ids, parting, wrong_fork, shared, wrong_rest, tokenizer, templates),
            _trimmed(pair.right.completion_ids, parting, right_fork, shared, right_rest, tokenizer, templates),
        )
        tokens = len(ids)
        if tokens <= max_tokens:
            return ids
    return None


def _plan_cuts(pair: Pair, right_fork: int, wrong_fork: int, remove_tokens: int) -> tuple[int, int, int] | None:
    """Return how many tokens to cut from the common prefix, the rest of y- and the rest of y+; None if too few can go.

    The rest begins at the fork. A token cut from the common prefix counts twice, because both solutions show it.
    """
    shared_room = max(0, pair.common_prefix_tokens - BEFORE_PARTING_TOKENS)
    wrong_room = max(0, len(pair.wrong.completion_ids) - wrong_fork - 2 * REST_TOKENS)
    right_room = max(0, len(pair.right.completion_ids) - right_fork - 2 * REST_TOKENS)
    shared = min(shared_room, -(-remove_tokens // 2))
    left = max(0, remove_tokens - 2 * shared)
    if left > wrong_room + right_room:
        return None
    wrong = -(-left * wrong_room // (wrong_room + right_room)) if left else 0
    return shared, wrong, left - wrong


def _trimmed(
    ids: Sequence[int],
    parting: int,
    fork: int,
    shared_cut: int,
    rest_cut: int,
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
) -> str:
    """Decode a solution with markers for `shared_cut` tokens cut before token `parting` and `rest_cut` after `fork`."""

    def text(piece: Sequence[int]) -> str:
        # A cut may split a character into bytes that decode to U+FFFD.
        return str(tokenizer.decode(list(piece), skip_special_tokens=True)).strip("\ufffd")

    start = 0
    pieces: list[str] = []
    if shared_cut:
        kept = parting - shared_cut
        before = max(min(BEFORE_PARTING_TOKENS, kept), kept // 2)
        start = parting - before
        pieces += [text(ids[: kept - before]), _fill(templates.trimmed_shared, count=str(shared_cut))]
    if rest_cut:
        kept = len(ids) - fork - rest_cut
        after = kept // 2
        pieces += [text(ids[start : fork + after]), _fill(templates.trimmed_rest, count=str(rest_cut))]
        pieces.append(text(ids[len(ids) - (kept - after) :]))
    else:
        pieces.append(text(ids[start:]))
    return "\n".join(piece for piece in pieces if piece)


__all__ = [
    "DEFAULT_TEMPLATES",
    "Templates",
    "UnfitPair",
    "analysis_prompt",
    "load_templates",
    "question_prompt",
    "replay_prompt",
]
