"""Chat templates that treat a system turn differently, and the prompt each gives for the same two messages."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

SYSTEM, QUESTION = "Be brief.", "What is 3 plus 2?"
_FOLDED = f"<|im_start|>user\n{SYSTEM}\n\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
_SYSTEM_TURN = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
_HAS_SYSTEM = "messages[0]['role'] == 'system'"
_SKIPS_SYSTEM = CHAT_TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the text of the prompt [system: SYSTEM, user: QUESTION] for the model."""

    source: str
    expected: str
    uses_system: bool = True
    """The template renders the system turn itself, so the prompt is TRL's."""


TEMPLATES = {
    "takes": ChatTemplate(CHAT_TEMPLATE, f"{_SYSTEM_TURN}<|im_start|>assistant\n"),
    "has a default": ChatTemplate(
        f"{{% if not {_HAS_SYSTEM} %}}{{{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}}}{{% endif %}}{CHAT_TEMPLATE}",
        f"{_SYSTEM_TURN}<|im_start|>assistant\n",
    ),
    "merges": ChatTemplate(
        f"{{% if {_HAS_SYSTEM} %}}{{% set s = '<<' + messages[0]['content'].strip() + '>> ' %}}{{% endif %}}"
        "{% for m in messages if m['role'] != 'system' %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + (s if loop.first and s else '') + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        f"<|im_start|>user\n<<{SYSTEM}>> {QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "rewrites": ChatTemplate(
        CHAT_TEMPLATE.replace("m['content']", "(m['content'] | upper if m['role'] == 'system' else m['content'])"),
        f"{_SYSTEM_TURN.replace(SYSTEM, SYSTEM.upper())}<|im_start|>assistant\n",
    ),
    "interprets": ChatTemplate(  # a switch in the system turn, which is not printed
        _SKIPS_SYSTEM + f"{{% if {_HAS_SYSTEM} and 'brief' in messages[0]['content'] %}}<think></think>{{% endif %}}",
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think></think>",
    ),
    "rejects": ChatTemplate(
        f"{{% if {_HAS_SYSTEM} %}}{{{{ raise_exception('System role not supported') }}}}{{% endif %}}{CHAT_TEMPLATE}",
        _FOLDED,
        uses_system=False,
    ),
    "drops": ChatTemplate(_SKIPS_SYSTEM, _FOLDED, uses_system=False),
}


def tokenizer_with(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: one token per ASCII character, so that token counts are character counts."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_that_adds(single: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts special tokens around plain text `$A`, such as `<|im_start|> $A <|im_end|>`."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(template)
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer
