"""The prompts of MEL (analysis, replay, control) as token ids.

Whatever a model or a dataset wrote is data here: it is put in by one pass of plain text replacement, and the control
tokens of the tokenizer are broken up in it, so that it can neither fill a placeholder nor open or close a chat turn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mel_lite.errors import ConfigError, DataError, ModelError
from mel_lite.models.chat import neutralise, safe_turns
from mel_lite.text import suggest
from mel_lite.types import Group, Message, Pair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE_PARTING_TOKENS = 48
"""Tokens up to the point of parting that are never trimmed."""
REST_TOKENS = 96
"""Tokens after that point, and as many at the end (the final answer), that are never trimmed."""
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
_REPLAY_USER = """\
You have studied this question before. These are your own notes, with pitfalls and rules to follow:

<notes>
{experience}
</notes>

Take them in as your experience. Then reason for yourself, in full, and answer.

{question}"""


@dataclass(frozen=True, slots=True)
class Templates:
    """The texts around what model and dataset wrote; `{name}` marks where that goes."""

    version: str = "1"
    """Names these texts in the store."""
    analysis_system: str = _ANALYSIS_SYSTEM
    analysis_user: str = _ANALYSIS_USER
    """I: `{question}`, `{wrong}`, `{right}`."""
    analysis_prefill: str = "## Bifurcation\n"
    """How every analysis begins: part of the context, not sampled and not trained on."""
    replay_user: str = _REPLAY_USER
    """The last user turn of a replay: `{experience}`, `{question}`."""
    trimmed_shared: str = "[... {count} tokens that both solutions share are left out ...]"
    """Stands for what was cut out of the common prefix."""
    trimmed_rest: str = "[... {count} tokens are left out ...]"
    """Stands for what was cut out after the point of parting."""


DEFAULT_TEMPLATES = Templates()

_PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    "analysis_user": ("question", "wrong", "right"),
    "replay_user": ("experience", "question"),
    "trimmed_shared": ("count",),
    "trimmed_rest": ("count",),
}


class PromptTooLong(Exception):
    """C_retro cannot be made to fit: the message says how many tokens there are and how many may be."""


def load_templates(path: str | None) -> Templates:
    """The default templates with the fields of a YAML file in place of theirs; None gives the defaults.

    A file that sets no `version` gets `custom-<hash of the texts>`. Raises: ConfigError for a file that cannot be
    read, an unknown field, a value that is not text, and a placeholder that is missing or unknown.
    """
    if path is None:
        return DEFAULT_TEMPLATES
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"templates={path!r} cannot be read: {error}. Give a YAML file of texts.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"templates={path!r} holds no fields. Write lines like `analysis_system: |` and the text.")
    known = [field.name for field in dataclasses.fields(Templates)]
    for name, value in loaded.items():
        if name not in known:
            raise ConfigError(f"templates={path!r}: unknown field {name!r}.{suggest(name, known)}")
        if not isinstance(value, str):
            raise ConfigError(f"templates={path!r}: {name} is {value!r}, not text. Put it in quotes.")
        _check_placeholders(path, name, value)
    if "version" not in loaded:
        digest = hashlib.blake2b(repr(sorted(loaded.items())).encode(), digest_size=4).hexdigest()
        loaded["version"] = f"custom-{digest}"
    return dataclasses.replace(DEFAULT_TEMPLATES, **loaded)


def _check_placeholders(path: str, name: str, text: str) -> None:
    expected = _PLACEHOLDERS.get(name, ())
    # `\boxed{answer}` is LaTeX, not a placeholder: a letter stands before the brace.
    for found in re.findall(r"(?<![A-Za-z])\{([a-z_]+)\}", text):
        if found not in expected:
            hint = suggest(found, expected) or f" {name} takes no placeholders; remove the braces."
            raise ConfigError(f"templates={path!r}: {name} has the unknown placeholder {{{found}}}.{hint}")
    for wanted in expected:
        if "{" + wanted + "}" not in text:
            raise ConfigError(f"templates={path!r}: {name} lacks the placeholder {{{wanted}}}. Put it in.")


def _fill(template: str, **values: str) -> str:
    """Put `values` in for their placeholders in one pass, so that no value is searched for placeholders."""
    return re.sub("|".join(r"\{" + name + r"\}" for name in values), lambda match: values[match[0][1:-1]], template)


def render(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefill: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids of a prompt, up to where the model's turn begins, then `prefill`.

    A conversation goes through the chat template with a generation prompt; special tokens spelled in its messages are
    broken up. Plain text is tokenised as it is, with the begin-of-sequence token the tokenizer puts in front.
    Raises: ModelError when a conversation meets a tokenizer without a usable chat template.
    """
    if isinstance(prompt, str):
        return _plain_ids(prompt + prefill, tokenizer)
    text = _chat_text(safe_turns(prompt, tokenizer), tokenizer, dict(chat_template_kwargs or {})) + prefill
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids[-1:] == [tokenizer.eos_token_id] != bare[-1:]:
        ids.pop()  # added by the tokenizer; it would end the prompt before the model's turn
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids.pop(0)  # the text brought its own
    return tuple(ids)


def _chat_text(messages: list[Message], tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """The conversation as the model expects it; a system turn its template refuses or drops joins the user's."""
    from jinja2.exceptions import TemplateError

    if not (tokenizer.chat_template or kwargs.get("chat_template")):
        raise ModelError(
            "The prompts are conversations, but the tokenizer has no chat template. Take an instruction-tuned model, "
            "give a chat template (`chat_template_path`), or make the prompts plain text, which base models take as is."
        )

    def apply(turns: list[Message]) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs))

    systems = [message["content"].strip() for message in messages if message["role"] == "system"]
    failure: TemplateError | None = None
    for turns in [messages, _without_system(messages)] if systems else [messages]:
        try:
            text = apply(turns)
        except TemplateError as error:
            failure = error
            continue
        if turns is not messages or all(system in text for system in systems):
            return text
    raise ModelError(
        f"The tokenizer's chat template rejects the conversation: {failure}. Check the roles and their order."
    ) from failure


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with what the system says put in front of the first user turn."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [dict(message) for message in messages if message["role"] != "system"]
    for message in rest:
        if message["role"] == "user":
            message["content"] = f"{system}\n\n{message['content']}"
            return rest
    return [{"role": "user", "content": system}, *rest]


def question_prompt(
    group: Group, tokenizer: PreTrainedTokenizerBase, *, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """The prompt of the group's rollouts, which is also that of the control without M."""
    return render(group.prompt, tokenizer, chat_template_kwargs=chat_template_kwargs)


def replay_prompt(
    group: Group,
    experience_text: str,
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """[x, M]: the group's prompt with M as the student's own notes in its last user turn; all else stays.

    Raises: DataError for a conversation without a user turn.
    """
    notes = neutralise(experience_text.strip(), tokenizer)
    if isinstance(group.prompt, str):
        prompt: Prompt = _fill(templates.replay_user, experience=notes, question=group.prompt)
        return render(prompt, tokenizer)
    turns = [dict(message) for message in group.prompt]
    users = [turn for turn in turns if turn["role"] == "user"]
    if not users:
        raise DataError(f"prompt {group.prompt_hash} has no message with role 'user' to ask the question. Add one.")
    users[-1]["content"] = _fill(templates.replay_user, experience=notes, question=users[-1]["content"])
    return render(turns, tokenizer, chat_template_kwargs=chat_template_kwargs)


def analysis_prompt(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
    *,
    max_context_tokens: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """C_retro = [I, x, y+, y-] and the prefill, in at most `max_context_tokens` tokens.

    Long solutions lose the middle of their common prefix first, then the middle of what comes after the point of
    parting; the tokens around that point and the end of each solution always stay. A plain-text question gives a
    plain-text prompt. Raises: PromptTooLong when all that may be cut is not enough.
    """

    def build(wrong: str, right: str) -> tuple[int, ...]:
        user = _fill(
            templates.analysis_user,
            question=neutralise(_question_text(pair.group.prompt), tokenizer, special_only=True).strip(),
            wrong=neutralise(wrong, tokenizer).strip(),
            right=neutralise(right, tokenizer).strip(),
        )
        if isinstance(pair.group.prompt, str):
            return render(f"{templates.analysis_system}\n\n{user}\n", tokenizer, prefill=templates.analysis_prefill)
        messages = [{"role": "system", "content": templates.analysis_system}, {"role": "user", "content": user}]
        return render(
            messages, tokenizer, prefill=templates.analysis_prefill, chat_template_kwargs=chat_template_kwargs
        )

    ids = whole = build(pair.wrong.text, pair.right.text)
    remove_tokens = 0
    for _ in range(_TRIM_ROUNDS):
        if len(ids) <= max_context_tokens:
            return ids
        # The markers cost tokens, and decoding pieces may retokenise by a few more or less: measured, then repeated.
        remove_tokens += len(ids) - max_context_tokens
        cuts = _plan_cuts(pair, remove_tokens)
        if cuts is None:
            break
        shared, wrong_rest, right_rest = cuts
        ids = build(
            _trimmed(pair.wrong.completion_ids, pair.common_prefix_tokens, shared, wrong_rest, tokenizer, templates),
            _trimmed(pair.right.completion_ids, pair.common_prefix_tokens, shared, right_rest, tokenizer, templates),
        )
    raise PromptTooLong(
        f"the analysis prompt has {len(whole)} tokens, {max_context_tokens} fit, and the rest may not be trimmed"
    )


def _question_text(prompt: Prompt) -> str:
    """What is asked, as text: the user's message, or every turn with its role when there are several."""
    if isinstance(prompt, str):
        return prompt
    turns = [message for message in prompt if message["role"] != "system"] or prompt
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def _plan_cuts(pair: Pair, remove_tokens: int) -> tuple[int, int, int] | None:
    """Tokens to cut from the common prefix (saved twice), the rest of y- and the rest of y+; None if too few."""
    shared_room = max(0, pair.common_prefix_tokens - BEFORE_PARTING_TOKENS)
    untouchable = pair.common_prefix_tokens + 2 * REST_TOKENS
    wrong_room = max(0, len(pair.wrong.completion_ids) - untouchable)
    right_room = max(0, len(pair.right.completion_ids) - untouchable)
    shared = min(shared_room, -(-remove_tokens // 2))
    left = max(0, remove_tokens - 2 * shared)
    if left > wrong_room + right_room:
        return None
    wrong = -(-left * wrong_room // (wrong_room + right_room)) if left else 0
    return shared, wrong, left - wrong


def _trimmed(
    ids: Sequence[int],
    parting: int,
    shared_cut: int,
    rest_cut: int,
    tokenizer: PreTrainedTokenizerBase,
    templates: Templates,
) -> str:
    """A solution without `shared_cut` tokens before and `rest_cut` tokens after token `parting`, with markers."""

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
        kept = len(ids) - parting - rest_cut
        after = kept // 2
        pieces += [text(ids[start : parting + after]), _fill(templates.trimmed_rest, count=str(rest_cut))]
        pieces.append(text(ids[len(ids) - (kept - after) :]))
    else:
        pieces.append(text(ids[start:]))
    return "\n".join(piece for piece in pieces if piece)


__all__ = [
    "DEFAULT_TEMPLATES",
    "PromptTooLong",
    "Templates",
    "analysis_prompt",
    "load_templates",
    "neutralise",
    "question_prompt",
    "render",
    "replay_prompt",
]
