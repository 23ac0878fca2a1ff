"""Control tokens in text that a model or a dataset wrote: broken up, so that they open and close no chat turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BREAK_ROUNDS = 4


def neutralise(text: str, tokenizer: PreTrainedTokenizerBase, *, special_only: bool = False) -> str:
    """Break up every control token spelled in `text` by a space after its first character.

    Control tokens are the tokenizer's special tokens and, unless `special_only`, its other added tokens that look like
    markup (`<think>`, `[TOOL]`); added runs of blanks are text. Afterwards the text holds none of them.
    """
    control = set(tokenizer.all_special_tokens)
    for added in tokenizer.added_tokens_decoder.values():
        is_markup = added.content[:1] + added.content[-1:] in ("<>", "[]") and not special_only
        if added.special or is_markup:
            control.add(added.content)
    control = {token for token in control if len(token) > 1 and not token.isspace()}
    if not control:
        return text
    pattern = re.compile("|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)))
    for _ in range(_BREAK_ROUNDS):  # what is broken up may spell another token
        text, found = pattern.subn(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if not found:
            break
    return text


def safe_turns(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """A conversation whose text spells no special token; content that is not text (images) stays."""
    return [
        {**turn, "content": neutralise(turn["content"], tokenizer, special_only=True)}
        if isinstance(turn.get("content"), str)
        else dict(turn)
        for turn in messages
    ]
