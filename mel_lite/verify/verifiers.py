"""Verifiers: binary verdicts on whether the final answer of a completion is the reference answer.

A verifier is `f(completion, answer, **columns)`: the completion's text, the row's reference answer, and those of the
row's other dataset columns that its signature names (all of them with `**kwargs`). The first two paragraphs of a
built-in verifier's docstring are its entry in docs/configuration.md.

A *marked* answer (`extract_answer`) always wins over the fallbacks for unmarked ones, so listing candidates gains
nothing. A reference that allows no verdict (empty, or not parsed by `math`/`numeric`/`multiple-choice`) gives ABSTAIN.

Answers are hostile text: nothing here evaluates them, and every pass over them is linear. `math` passes them to sympy,
which may run for hours: call it through `mel_lite.verify.pool.VerifyPool`, which enforces a deadline.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mel_lite.errors import VerifierError
from mel_lite.imports import load_object
from mel_lite.text import did_you_mean
from mel_lite.types import Verdict
from mel_lite.verify import choices, extract, gym, markup, numbers, words
from mel_lite.verify.extract import extract_answer
from mel_lite.verify.thoughts import THINK_TAGS, answer_part

RIGHT_SCORE = 0.99
"""Least score of `reasoning-gym` that counts as RIGHT: partial credit is not a right answer."""
MAX_LABEL_WORDS = 2
"""Most words in an unmarked last line that is read as an answer with its unit rather than as a sentence."""
TINY = 1e-3
"""Size below which numbers that math-verify calls equal are also compared relatively."""
MAX_ANSWER_CHARS = 2_000
"""Longest final answer that is read. A longer one is WRONG: parsers of nested text are not linear."""
_MISREAD = re.compile(r"\d\s*_\s*[\d{]|\b0[xXbBoO][0-9A-Fa-f]|^\W*[-\u2212]\s*[-\u2212]")
"""Notation that math-verify drops: a number in another base (`427_8`, `0x10`), and repeated signs."""
_BECAUSE = re.compile(r",?\s(?:because|since)\s")
_SUBJECT = (
    r"(?:it|they|he|she|this|that|there|we|you|i)\s"
    r"(?:is|are|was|were|does|do|did|can|could|has|have|will|would)"
)
_REPEATED = re.compile(
    rf"(?P<yes>yes)\W{{1,4}}{_SUBJECT}\W*|(?P<no>no)\W{{1,4}}{_SUBJECT}(?:n['\u2019]t|\snot)\W*", re.IGNORECASE
)
"""`Yes, it is.`: the second half says the first again."""
_WORDS = frozenset({"yes", "no", "odd", "all", "any", "one", "two", "six", "ten", "red"})
"""Answers that are words although they could be products of variables."""
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,4})(?![0-9.A-Za-z])")
_PRODUCT = re.compile(
    r"(?<![A-Za-z\\0-9.])([0-9]+(?:\.[0-9]+)?)[ ]?(?!cc\b)([abcxyz](?:[ ]?[abcxyz]){1,3})(?![A-Za-z])"
)
"""A product of variables that math-verify may take for a unit and drop: `5ab`."""
_DEGREES = re.compile(
    r"\\(?P<function>sin|cos|tan|cot|sec|csc)\s?(?P<open>\(|\\left\()?\s?(?P<angle>[0-9]{1,9}(?:\.[0-9]{1,9})?)\s?"
    r"(?:\^\s?(?:\\circ|\{\s?\\circ\s?\})|\u00b0)\s?(?(open)(?:\\right)?\))"
)
"""A function of an angle in degrees, whose sign math-verify drops."""
_PLAIN_NUMBER = re.compile(r"[^=!\\()]*")
"""Text of two answers in which nothing but a number can be meant: no equation, factorial or command."""
TAIL_CHARS = 2_000
"""Length of the end of a completion that `math` searches when no answer is marked."""


def exact(completion: str, answer: str) -> Verdict:
    """Require the same text, apart from case, spaces, quotes, Markdown and the final dot.

    Without a marked answer, the whole completion or its last line may match.
    """
    gold = extract.normalize(answer)
    if not gold:
        return Verdict.ABSTAIN
    marked = extract_answer(completion)
    if marked is None:
        candidates = [completion, extract.last_line(completion)]
    else:
        candidates = [marked, extract.first_sentence(marked), _BECAUSE.split(marked, maxsplit=1)[0]]
        if repeated := _REPEATED.fullmatch(marked):
            candidates.append(repeated["yes"] or repeated["no"])
    return _verdict(any(extract.normalize(candidate) == gold for candidate in candidates))


def numeric(completion: str, answer: str) -> Verdict:
    """Require the same number: exactly for integers, else within 2e-6. Currency, separators and units are ignored.

    A marked answer must hold one number (after its last `=`): `3, 4 or 5` is no answer. Without a marked answer, the
    last number of the completion is read.
    """
    gold = numbers.sole_number(extract.marked_or_whole(answer))
    if gold is None:
        return Verdict.ABSTAIN
    marked = extract_answer(completion)
    found = numbers.last_number(completion) if marked is None else numbers.sole_number(marked)
    return _verdict(found is not None and numbers.same_number(found, gold))


def multiple_choice(completion: str, answer: str) -> Verdict:
    """Require the same letter A-J: `B`, `(B)`, `B.`, `B) Paris`, `option B`, `the answer is B`.

    Without a marked answer, a lone letter or the only `(X)` of the completion is read.
    """
    gold = choices.choice_letter(extract.marked_or_whole(choices.without_tags(answer)))
    if gold is None:
        return Verdict.ABSTAIN
    completion = choices.without_tags(completion)
    marked = extract_answer(completion)
    found = choices.sole_choice(completion) if marked is None else choices.choice_letter(marked)
    return _verdict(found == gold)


def math_verify(completion: str, answer: str) -> Verdict:
    """Require equality by math-verify: of fractions, surds, sets, intervals, matrices, percent, `x = 5` for `5`.

    The reference may be LaTeX or plain. Without a marked answer, the last formula or number of the last 2,000
    characters is read.

    Has no deadline of its own. Raises: MemoryError, which the pool counts.
    """
    gold_text = numbers.spelled_out(markup.join_thousands(extract.marked_or_whole(answer)))
    if (
        extract.is_word(gold_text) or extract.normalize(gold_text) in _WORDS
    ):  # a letter product would make anagrams equal
        return exact(completion, gold_text)
    gold = _parse_formula(gold_text)
    if gold is None:
        return exact(completion, gold_text) if words.words_of(gold_text) else Verdict.ABSTAIN
    marked = extract_answer(completion)
    if marked is None:
        prose = markup.join_thousands(markup.plain(completion[-TAIL_CHARS:]))
        if words.names_something(gold_text):
            last = extract.normalize(extract.last_line(completion))
            return _verdict(f" {last}".endswith(f" {extract.normalize(gold_text)}") and not numbers.denies(last))
        last = extract.last_line(completion)
        if len(words.words_of(last)) <= MAX_LABEL_WORDS and words.words_differ(last, gold_text):
            return Verdict.WRONG
        return _verdict(_equal(gold, _parse_prose(prose)))
    if len(marked) > MAX_ANSWER_CHARS:
        return Verdict.WRONG
    marked = numbers.spelled_out(markup.join_thousands(extract.first_sentence(marked)))
    if extract.normalize(marked) == extract.normalize(gold_text):
        return Verdict.RIGHT
    if extract.normalize(marked) in _WORDS:
        return Verdict.WRONG
    if _MISREAD.search(marked) or _words_rule_out(marked, gold_text):
        return Verdict.WRONG
    value, gold_value = numbers.sole_number(marked), numbers.sole_number(gold_text)
    if value is not None and gold_value is not None and _PLAIN_NUMBER.fullmatch(marked + gold_text):
        return _verdict(numbers.same_number(value, gold_value))
    if _equal(
        gold, _parse_prose(marked, latex_only=True) if extract.has_math_delimiters(marked) else _parse_formula(marked)
    ):
        return Verdict.RIGHT
    if "=" in marked or "=" in gold_text:  # which variable has the value matters, and math-verify has looked at it
        return Verdict.WRONG
    # "5 apples", "$1,234.50"
    return _verdict(value is not None and gold_value is not None and numbers.same_number(value, gold_value))


def _words_rule_out(marked: str, gold_text: str) -> bool:
    """Return True when words make the answers differ: other units, a name that only the reference has, a denial."""
    if words.words_differ(marked, gold_text) or (words.names_something(gold_text) and not words.words_of(marked)):
        return True
    return bool(numbers.denies(marked)) and not numbers.denies(gold_text)


@lru_cache(maxsize=4096)
def _parse_formula(text: str) -> Any:
    """Return the sympy object of a bare formula, or None when it does not parse."""
    from math_verify import LatexExtractionConfig, parse

    text = markup.powers(text.strip().strip("$").strip().replace("**", "^")).replace("\u221e", r"\infty ")
    text = _SCIENTIFIC.sub(r"\1 \\cdot 10^{\2}", text.replace(r"\varnothing", r"\emptyset"))
    text = _DEGREES.sub(r"\\\g<function>(\\frac{\g<angle>\\pi}{180})", text)
    text = _PRODUCT.sub(lambda match: "*".join((match[1], *match[2].replace(" ", ""))), text)
    if not text or len(text) > MAX_ANSWER_CHARS:
        return None
    found = parse(
        f"${text}$", extraction_config=[LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    return found[0] if found else None


def _parse_prose(text: str, *, latex_only: bool = False) -> Any:
    """Return the sympy object of the last formula (or number, unless `latex_only`) in running text, or None."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    kinds = [LatexExtractionConfig()] if latex_only else [LatexExtractionConfig(), ExprExtractionConfig()]
    found = parse(text, extraction_config=kinds, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _equal(gold: Any, found: Any) -> bool:
    """Compare by math-verify, to which the order of the two matters. An error inside it counts as not equal."""
    from math_verify import verify

    if found is None:
        return False
    try:
        found = _with_imaginary_unit(gold, found)
        if verify(gold, found, timeout_seconds=None, allow_set_relation_comp=True, raise_on_error=True):
            return not _differ_when_tiny(gold, found)
        return _agree_when_huge(gold, found)
    except MemoryError:
        raise
    except Exception:
        return False


def _with_imaginary_unit(gold: Any, found: Any) -> Any:
    """Return `found` with i as the imaginary unit where an exponential has no other variable, and `gold` has none."""
    names = {symbol.name for symbol in getattr(found, "free_symbols", ())}
    if names != {"i"} or "exp(" not in str(found) or getattr(gold, "free_symbols", True):
        return found
    one = found**0
    return found.subs({symbol: (-one) ** (one / 2) for symbol in found.free_symbols})


def _differ_when_tiny(gold: Any, found: Any) -> bool:
    """Return True for numbers that only math-verify's rounding to six decimals makes equal, in sets and tuples too."""
    parts = [getattr(one, "args", ()) for one in (gold, found)]
    if not all(getattr(one, "is_number", False) for one in (gold, found)):
        kinds = {type(one).__name__ for one in (gold, found)}
        if not kinds <= {"FiniteSet", "Tuple"} or len(parts[0]) != len(parts[1]):
            return False
        return any(_differ_when_tiny(*pair) for pair in zip(*parts, strict=True))
    size = max(abs(complex(one.evalf(15))) for one in (gold, found))
    return size < TINY and abs(complex((gold - found).evalf(15))) > float(numbers.TOLERANCE) * size


def _agree_when_huge(gold: Any, found: Any) -> bool:
    """Return True for huge numbers, not both integers, whose relative difference is within the tolerance."""
    if not all(getattr(one, "is_number", False) for one in (gold, found)) or (gold.is_integer and found.is_integer):
        return False
    size = abs(complex(gold.evalf(15)))
    if not numbers.HUGE <= size < math.inf:
        return False
    return abs(complex(found.evalf(15)) - complex(gold.evalf(15))) <= float(numbers.TOLERANCE) * size


def reasoning_gym(completion: str, answer: str, gym_entry: str) -> Verdict:
    """Require a score of at least 0.99 from the task's own scorer. Needs the `gym` extra.

    Without a marked answer, the whole completion is scored.

    `gym_entry` is the generated entry as JSON, as `load_tasks` stores it.
    """
    marked = extract_answer(completion)
    candidate = markup.clean(completion if marked is None else marked).strip()
    if len(candidate) > MAX_ANSWER_CHARS:
        return Verdict.WRONG
    return _verdict(gym.score(candidate, gym_entry) >= RIGHT_SCORE)


BUILT_IN: dict[str, Callable[..., Verdict]] = {
    "math": math_verify,
    "numeric": numeric,
    "exact": exact,
    "multiple-choice": multiple_choice,
    "reasoning-gym": reasoning_gym,
}


@dataclass(frozen=True, slots=True)
class Verifier:
    """A verifier function with its name and columns; calling it returns a Verdict."""

    name: str
    function: Callable[..., Any]
    columns: frozenset[str] | None
    """Names of the dataset columns the function takes; None = all of them."""
    by_keyword: bool
    """True when its parameters are called `completion` and `answer`: it is then called by keyword."""
    think_tags: tuple[tuple[str, str], ...] = ()
    """Start and end tags of the thoughts that a built-in verifier does not read. Your own gets the whole text."""

    def __call__(self, completion: str, answer: str, /, **columns: Any) -> Verdict:
        """Return the verdict on one completion.

        Raises: whatever the function raises; VerifierError for a return value that is not a verdict.
        """
        if self.think_tags:
            completion = answer_part(completion, self.think_tags) or ""
        taken = {
            name: value
            for name, value in columns.items()
            if name not in ("completion", "answer") and (self.columns is None or name in self.columns)
        }
        if self.by_keyword:
            return self._as_verdict(self.function(completion=completion, answer=answer, **taken))
        return self._as_verdict(self.function(completion, answer, **taken))

    def _as_verdict(self, result: Any) -> Verdict:
        if isinstance(result, str) and result in tuple(Verdict):
            return Verdict(result)
        if isinstance(result, bool) or (type(result).__name__ == "bool" and type(result).__module__ == "numpy"):
            return _verdict(bool(result))
        raise VerifierError(
            f"verifier = {self.name!r} returned {type(result).__name__} {repr(result)[:80]}. Return 'right', 'wrong', "
            "'abstain', a Verdict or a bool; turn a score into a bool with your own threshold, such as score >= 0.99."
        )


def get_verifier(name: str | Callable[..., Any], *, think_tags: Sequence[tuple[str, str]] = THINK_TAGS) -> Verifier:
    """Return the verifier called `name`: a built-in, a dotted path, or a function itself.

    The path is `package.module:function` or `package.module.function`. `think_tags` are the (start, end) tags around
    the thoughts of a completion, which built-in verifiers do not read.

    Raises: VerifierError when there is none of that name, it cannot be imported, or it cannot be called.
    """
    if not isinstance(name, str):
        if not callable(name):
            raise VerifierError(
                f"verifier = {name!r} is a {type(name).__name__}. Set a name ({', '.join(BUILT_IN)}), a dotted path, "
                "or a function (completion, answer)."
            )
        built_in = next((key for key, function in BUILT_IN.items() if function is name), None)
        if built_in is None:
            return _wrap(callable_name(name), name)
        name = built_in
    if name in BUILT_IN:
        if name == "reasoning-gym":
            gym.require()
        return replace(_wrap(name, BUILT_IN[name]), think_tags=tuple(think_tags))
    if ":" not in name and "." not in name:
        raise VerifierError(
            f"verifier = {name!r} is not known.{did_you_mean(name, BUILT_IN)} Built in: {', '.join(BUILT_IN)}; "
            "your own: a dotted path such as 'my_package.my_module:my_function'."
        )
    function = load_object(name, field="verifier", error=VerifierError)
    if not callable(function):
        raise VerifierError(f"verifier = {name!r} is a {type(function).__name__}, not a function.")
    return _wrap(name, function)


def callable_name(function: Callable[..., Any]) -> str:
    """Return the dotted path of a function or class instance, as messages and saved options show it."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


class PassedFunction:
    """A function within a copied or pickled config: a copy holds the function, a pickle its name."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __deepcopy__(self, _: Any) -> PassedFunction:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (callable_name(self.function),)


def _wrap(name: str, function: Callable[..., Any]) -> Verifier:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable written in C
        return Verifier(name, function, frozenset(), by_keyword=False)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    by_keyword = {"completion", "answer"} <= {p.name for p in named}
    if not by_keyword and len(positional) < 2 and not takes_rest:
        raise VerifierError(
            f"verifier = {name!r} must take two arguments, (completion, answer), and dataset columns after them."
        )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return Verifier(name, function, None, by_keyword)
    own = {"completion", "answer"} if by_keyword else {p.name for p in positional[:2]}
    return Verifier(name, function, frozenset(p.name for p in named) - own, by_keyword)


def _verdict(right: bool) -> Verdict:
    return Verdict.RIGHT if right else Verdict.WRONG


__all__ = ["BUILT_IN", "Verifier", "extract_answer", "get_verifier"]
