"""Chat text: prompts as token ids for the model, and as text for people.

`render` is the only code that turns a prompt into tokens: rollouts, replay and its control, analysis, evaluation and
warm-up all call it, so that they see the same tokens for the same messages. Text from a dataset or a model cannot open
or close a chat turn in it, because control tokens spelled in the text are broken up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mel_lite.errors import ModelError
from mel_lite.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]
_BREAK_ROUNDS = 4
_END_TOKENS = 48
"""Tokens of a prompt's end that are decoded. The longest tag with its line breaks takes fewer."""
_OTHER_TEXT = "Does this template use the turn?"
"""Replaces a turn to see if the rendered text changes."""
_OTHER_CALLS = [{"type": "function", "function": {"name": "other", "arguments": {"value": 0}}, "name": "other"}]
_SYSTEM_ROLES = ("system", "developer")
_SET_HERE = ("tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors")
"""Arguments of `apply_chat_template` that `render` decides."""


def render(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prefill: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Return the token ids of a prompt up to the start of the model's turn, followed by `prefill`.

    A conversation goes through the chat template with a generation prompt. A system or developer turn that the template
    rejects or ignores is moved to the front of the first user turn; all other conversations give the tokens of TRL's
    GRPOTrainer.
    Plain text gets the begin-of-sequence token if the tokenizer adds one and the text has none, and no end-of-sequence
    token.

    Raises: ModelError for a conversation when the tokenizer has no chat template, or the template rejects it or leaves
    out another turn.
    """
    if isinstance(prompt, str):
        return _plain_ids(prompt + prefill, tokenizer)
    text = _chat_text(safe_turns(prompt, tokenizer), tokenizer, chat_template_kwargs or {}) + prefill
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_tasks(
    prompts: Iterable[Prompt], render_one: Callable[[Prompt], tuple[int, ...]], source: str
) -> list[tuple[int, ...]]:
    """Return the token ids of every prompt of `source`. Raises: ModelError of `render_one`, with task and column."""
    rendered = []
    for number, prompt in enumerate(prompts, 1):
        try:
            rendered.append(render_one(prompt))
        except ModelError as error:
            raise ModelError(f"{source}, task {number}, column 'prompt': {error}") from error
    return rendered


def check_conversation(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Render a conversation as text only, which costs less than `render`. Raises: ModelError, like `render`."""
    if not isinstance(prompt, str):
        _chat_text(safe_turns(prompt, tokenizer), tokenizer, chat_template_kwargs or {})


def prompt_end(prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end of a rendered prompt as text, decoded like a completion: without special tokens."""
    return str(tokenizer.decode(list(prompt_ids[-_END_TOKENS:]), skip_special_tokens=True))


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    ids = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids[-1:] == [tokenizer.eos_token_id] != bare[-1:]:
        ids.pop()  # added by the tokenizer; it would end the prompt before the model's turn
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids.pop(0)  # the text has its own
    return tuple(ids)


def _chat_text(turns: list[Turn], tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    if not (tokenizer.chat_template or kwargs.get("chat_template")):
        raise ModelError(
            "The prompts are conversations, but the tokenizer has no chat template. Take an instruction-tuned model, "
            "add chat_template.jinja to the model's folder, set chat_template_kwargs={'chat_template': ...}, or make "
            "the prompts plain text, which base models take as is."
        )
    if taken := [name for name in _SET_HERE if name in kwargs]:
        raise ModelError(f"chat_template_kwargs has {taken[0]!r}, which every prompt sets in its own way. Remove it.")

    def apply(turns: list[Turn]) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs))
        except Exception as error:  # a template is a program, which may raise any error
            raise _Rejected(str(error) or type(error).__name__) from error

    systems = [i for i, turn in enumerate(turns) if turn.get("role") in _SYSTEM_ROLES] if is_text(turns) else []
    failure: _Rejected | None = None
    try:
        text = apply(turns)
        if all(_is_used(turns, i, text, apply) for i in systems):
            return _complete(turns, text, apply)
    except _Rejected as error:
        failure = error
    if systems:
        try:
            return _complete(folded := _without_system_turns(turns), apply(folded), apply)
        except _Rejected as error:
            failure = error
    raise ModelError(
        f"The tokenizer's chat template rejects the conversation: {failure}. Check the roles and their order, or "
        "set another template in chat_template_kwargs={'chat_template': ...}."
    ) from failure


class _Rejected(Exception):
    """Raised when the chat template cannot render a conversation."""


def _is_used(turns: list[Turn], index: int, text: str, apply: Callable[[list[Turn]], str]) -> bool:
    """Return True unless `text`, the rendered conversation, stays the same when system turn `index` says other words.

    Searching `text` for the turn would not do: a template may interpret a system turn (`/no_think`) without printing
    it, and the words of a turn that it ignores may also be elsewhere.
    """
    if not turns[index]["content"].strip():
        return True  # there is nothing to lose
    return _matters({"content": _OTHER_TEXT}, turns, index, text, apply)


def _matters(other: Turn, turns: list[Turn], index: int, text: str, apply: Callable[[list[Turn]], str]) -> bool:
    """Return True unless the rendered `text` stays the same with the keys of `other` in turn `index`."""
    try:
        return apply([*turns[:index], {**turns[index], **other}, *turns[index + 1 :]]) != text
    except _Rejected:
        return True


def _complete(turns: list[Turn], text: str, apply: Callable[[list[Turn]], str]) -> str:
    """Return `text`, the rendered conversation. Raises: ModelError when a turn or its tool calls are not in it."""
    if not is_text(turns):
        return text
    for index, turn in enumerate(turns):
        content, calls = turn["content"].strip(), turn.get("tool_calls")
        if calls and not _matters({"tool_calls": _OTHER_CALLS}, turns, index, text, apply):
            lost = "the tool calls"
        elif (
            content
            and text.count(content) < sum(content in other["content"] for other in turns)
            and not _matters({"content": _OTHER_TEXT}, turns, index, text, apply)
        ):
            lost = "the text"
        else:
            continue
        raise ModelError(
            f"The tokenizer's chat template leaves out {lost} of turn {index + 1} (role {turn.get('role')!r}). Set "
            "a template with a place for it in chat_template_kwargs={'chat_template': ...}, or write it into a user "
            "turn."
        )
    return text


def _without_system_turns(turns: list[Turn]) -> list[Turn]:
    """Return the conversation with the text of its system turns at the front of the first user turn."""
    texts = [turn["content"] for turn in turns if turn["role"] in _SYSTEM_ROLES]
    system = "\n\n".join(text for text in texts if text.strip())
    rest = [turn for turn in turns if turn["role"] not in _SYSTEM_ROLES]
    for i, turn in enumerate(rest):
        if turn["role"] == "user":
            content = f"{system}\n\n{turn['content']}" if system else turn["content"]
            return [*rest[:i], {**turn, "content": content}, *rest[i + 1 :]]
    return [{"role": "user", "content": system}, *rest]


# ---- control tokens in text ----


def neutralize(text: str, tokenizer: PreTrainedTokenizerBase, *, special_only: bool = False) -> str:
    """Break up every control token spelled in `text` with a space after its first character.

    Control tokens are the tokenizer's special tokens and, unless `special_only`, its other added tokens that look like
    markup (`<think>`, `[TOOL]`). Added runs of blanks are ordinary text.
    """
    return _broken_up(text, _control_tokens(tokenizer, special_only=special_only))


def _control_tokens(tokenizer: PreTrainedTokenizerBase, *, special_only: bool) -> re.Pattern[str] | None:
    """Return a pattern of the control tokens, longest first, or None if there are none."""
    control = set(tokenizer.all_special_tokens)
    for added in tokenizer.added_tokens_decoder.values():
        is_markup = added.content[:1] + added.content[-1:] in ("<>", "[]") and not special_only
        if added.special or is_markup:
            control.add(added.content)
    control = {token for token in control if len(token) > 1 and not token.isspace()}
    if not control:
        return None
    return re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)))


def _broken_up(text: str, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return text
    for _ in range(_BREAK_ROUNDS):  # breaking up one token may spell another
        text, found = pattern.subn(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if not found:
            break
    return text


def safe_turns(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
    """Return the conversation as a template gets it, with the special tokens in all its texts broken up.

    Keys that are null are left out at every depth: a dataset adds them where other rows have the key. Missing content,
    as in a turn of tool calls alone, is an empty text.
    """
    special = _control_tokens(tokenizer, special_only=True)  # takes longer than the texts of a conversation
    return [{"content": "", **_safe(turn, special)} for turn in messages]


def _safe(value: Any, special: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        return _broken_up(value, special)
    if isinstance(value, Mapping):
        return {name: _safe(item, special) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_safe(item, special) for item in value]
    return value


# ---- prompts as text ----


def is_text(prompt: Any) -> bool:
    """Return True for plain text and for a conversation whose turns all have text (or null) as content."""
    return isinstance(prompt, str) or all(isinstance(turn.get("content"), str | None) for turn in prompt)


def turn_text(turn: Mapping[str, Any]) -> str:
    """Return the text of a turn: its content, or the text parts of it, and its tool calls as JSON."""
    content = turn.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    calls = [json.dumps(_without_nulls(call), ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join([content, *calls] if content else calls)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def question_text(prompt: Prompt) -> str:
    """Return the question for a reader: the user's turn, or every turn with its role if there are several.

    System turns are left out unless there are no others.
    """
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if turn["role"] != "system"] or prompt
    if len(turns) == 1:
        return turn_text(turns[0])
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn_text(turn)}" for turn in turns)


def prompt_text(prompt: Prompt) -> str:
    """Return all that the policy was shown: the text of every turn, system turns included, without roles."""
    return prompt if isinstance(prompt, str) else "\n".join(turn_text(turn) for turn in prompt)


__all__ = [
    "check_conversation",
    "is_text",
    "neutralize",
    "prompt_text",
    "question_text",
    "render",
    "render_tasks",
    "safe_turns",
    "turn_text",
]
