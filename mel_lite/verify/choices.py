"""Read which option A-J a text chooses, in the sentences that people and models write. Ambiguity is no choice."""

from __future__ import annotations

import re

from mel_lite.verify import markup
from mel_lite.verify.extract import HYPOTHESIS, TEXT_COMMAND, last_line

_L = r"['\"\u201c\u2018]?[(\[{<]{0,2}[ ]?(?P<letter>[A-J])\b[ ]?[)\]}>]{0,2}['\"\u201d\u2019]?"
_NOUN = (
    r"(?:option|choice|letter|answer|alternative|solution|selection|pick|statement|response|guess|opt|"
    r"(?:final|correct)(?=\s*[:=]))"
)
_LABEL = re.compile(
    r"(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:(?:option|choice|letter|answer)\s*:?\s*)?"
    r"(?:[(\[{<]{1,2}[ ]?(?P<bracketed>[A-Ja-j])[ ]?[)\]}>]{1,2}|"
    r"(?P<plain>[A-Ja-j])(?=$|[.:),;!?\u2026]|\s+(?:[-\u2014=\u2192]|[-=]>)\s|\s*\u2014|"
    r"\s+\(|\s+(?:because|since|over|instead of|rather than|(?:and|but) not)\s))[.:),;!?\u2014\u2026-]*(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_ANOTHER = re.compile(
    r"\W{0,4}(?:(?i:or|and|maybe|perhaps|possibly|also|then|vs\.?)\b\W{0,4}){0,3}"
    r"(?i:(?:option|choice|letter)\s+)?(?:[(\[][A-J][)\]]|[A-J](?=\W*$|[).:,;]))",
)
_ALTERNATIVE = re.compile(
    r"(?<![A-Za-z'])[(\[]?[A-J][)\]]?\s(?:is|seems|looks|(?:could|may|might) be)\s+(?:also|equally|just as)\b|"
    r"(?:\b(?i:or|maybe|perhaps|possibly|could(?: also)? be|might(?: also)? be|alternatively|as well as)\b|[&/])"
    r"[^.\n]{0,30}?(?<![A-Za-z'])[(\[]?[A-J](?![A-Za-z'])(?!\s+[a-z])",
)
_CONDITION = re.compile(r"\b(?:(?<!even )if|unless)\s(?!i\b|my\b|you\b)", re.IGNORECASE)
_WRONG = re.compile(r"\W{0,3}(?:incorrect|wrong|false)\b", re.IGNORECASE)
_REASON = re.compile(
    r"\b(?:because|since|as|due to|given|while|whereas|for|which)\b|[;\u2014\u2013]|\s-\s|[.!?](?=\s)|\n"
)
_MENTION = re.compile(
    r"(?<![A-Za-z0-9\\-])(?<![A-Za-z]['\u2019])(?P<open>[(\[{]?)(?P<letter>[A-J])(?P<close>[)\]}]?)(?![A-Za-z0-9]|['\u2019][A-Za-z])"
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:opposite of|contrary (?:of|to)|other than|"
    r"vitamin|hepatitis|plan|grade|type|section|team|angle|room|class|appendix|"
    r"(?:any|every)thing but|any but|all but|doubt(?: that)?|if|whether|not|neither|"
    r"nor|never|except|than|excludes?|excluding|eliminated?|eliminating|eliminates|reject(?:ed)?|"
    r"rule out|ruled out|instead of|unlike|without)|"
    r"n['\u2019]t(?: be| (?:think|believe|say)(?: that)?(?: it(?:['\u2019]s| is))?)?|"
    r"(?:\b(?:not|never|refuse to)|n['\u2019]t) "
    r"(?:choose|pick|select|mark|(?:go|settle) (?:with|for|on)|(?:opt|vote) for)|"
    r"\bavoid(?:s|ed|ing)?(?: (?:choosing|picking|selecting))?)"
    r"\W{1,3}(?:(?:option|choice|letter|answer|be|the)\W{1,2}){0,2}$",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[)\]}]?(?:\s?[:=]\s?(?:wrong|incorrect|false|no)\b|\W{0,2}(?:(?:is|are|was|seems|looks)\s+(?:also\s+|clearly\s+|definitely\s+)?"
    r"(?:wrong|incorrect|not|false|too|out\b|ruled|"
    r"eliminated|impossible|excluded|invalid)|"
    r"(?:which|that)\s(?:is|was)\s(?:wrong|incorrect|false|not)|"
    r"(?:is|are|was|does|do|did|can|could|would)n['\u2019]t|cannot|fails?\b|(?:does|do|can) not))",
    re.IGNORECASE,
)
_ASSERTIONS = (
    re.compile(
        rf"(?<!wrong )(?<!incorrect )(?<!false )(?<!least likely )\b{_NOUN}(?:['\u2019]s)?"
        rf"(?:\s+that\s[^.\n]{{1,40}}?)?\s*"
        rf"(?:(?:is|was|would be|must be|should be|has to be|will be|seems to be)\b\s*|[:=]\s*)?"
        rf"(?:(?:clearly|definitely|therefore|thus|indeed|likely|probably|option|choice|letter)\b[\s,:]*){{0,3}}{_L}",
        re.IGNORECASE,
    ),
    re.compile(
        rf"{_L}\W{{0,3}}(?:is|must be|should be|would be|has to be|seems|looks)\s+"
        r"(?:clearly\s+|indeed\s+|therefore\s+|definitely\s+|also\s+|obviously\s+)?(?:the\s+)?(?:only\s+|most\s+)?"
        r"(?:correct|right|best|answer|true|valid|one\b|solution|better|likely|plausible|my\s+(?:final\s+)?(?:answer|choice)|"
        r"(?:option|choice)\s+(?:left|remaining|that\s+(?:works|fits)))",
        re.IGNORECASE,
    ),
    re.compile(
        rf"\b(?:find|consider|deem|judge)\s+(?:(?:option|choice|answer)\s+)?{_L}\s+(?:to\s+be\s+)?(?:the\s+)?"
        r"(?:most|more|best|correct|right|true)\b",
        re.IGNORECASE,
    ),
    re.compile(rf"{_L}\s?[:=]\s?(?:true|correct|right|yes)\b", re.IGNORECASE),
    re.compile(rf"{_L}\W{{0,3}}(?:works|fits|holds|matches|remains|it\s+is(?=\W*$))", re.IGNORECASE),
    re.compile(
        rf"\b(?:choos(?:e|ing)|chose|pick(?:ed|ing)?|select(?:ed|ing)?|go(?:ing)?\s+(?:with|for)|went\s+(?:with|for)|opt(?:ing)?\s+for|"
        rf"settle\s+on|settled\s+on|vote\s+for|(?:confident|sure)\s+(?:in|of)|mark)\W{{1,3}}(?:(?:option|choice|letter|answer)\W{{1,2}})?{_L}",
        re.IGNORECASE,
    ),
    re.compile(
        rf"\b(?:it['\u2019]?s|it\s+is|it\s+must\s+be|that['\u2019]?s|that\s+is|must\s+be|actually|therefore|thus|hence|so|then|"
        rf"leaves(?:\s+us\s+with)?|leaving(?:\s+us\s+with)?|probably|yes|left\s+with|has\s+to\s+be|i\.e\.|but|clearly|definitely|obviously|surely|i['\u2019]?d\s+say|i\s+(?:would\s+)?(?:say|think|believe|guess))"
        rf"[\s,:]*(?:it\s+is\s+|it['\u2019]s\s+|only\s+)?(?:(?:option|choice|letter|answer)\s+)?{_L}(?=\W*$|\W*[.;,!\n])",
        re.IGNORECASE,
    ),
)
_QUESTION = re.compile(r"[^.!?;\n]{0,200}(?<![A-Za-z0-9])[(\[]?[A-J][)\]]?[\"'*_]{0,3}[ ]?\?+[\"')]?")
"""A question that ends with an option: `Is it B?`"""
_YES, _NO = (re.compile(rf"\W{{0,4}}(?:{words})(?=\W*$|\W{{1,3}}\S)", re.IGNORECASE) for words in (
    "yes|true|right|correct|\u2713|\u2714|\u2705", "no|not|false|wrong|incorrect|\u2717|\u2718|\u274c|\u2716"
))  # fmt: skip
_TICK, _CROSS = r"[\u2713\u2714\u2705]\ufe0f?", r"[\u2717\u2718\u274c\u2716]\ufe0f?"
_SIGNED = (
    (
        (re.compile(rf"{_TICK}\s{{0,3}}(?=[(\[]?[A-J]\b)"), ""),
        (re.compile(rf"{_CROSS}\s{{0,3}}(?=[(\[]?[A-J]\b)"), "not "),
    ),
    tuple(
        (re.compile(rf"(?<=\b[A-J])([)\]]?)[ \t]{{0,3}}{sign}(?=[\s,;]|$)"), rf"\1 is {word}")
        for sign, word in ((_TICK, "correct"), (_CROSS, "wrong"))
    ),
)
"""Ticks and crosses in front of an option, and behind it."""
_SIGN_OR_LETTER = re.compile(rf"(?P<sign>{_TICK}|{_CROSS})|(?<![A-Za-z])[A-J](?![A-Za-z])")
_REVISION = re.compile(
    r"\b(?:actually|wait|instead|correction|on second thought|no,|rather|finally|in the end)", re.IGNORECASE
)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+|,?\s+but\s+(?=(?:actually|in fact|on second thought|rather)\b)")
_FUNCTION_WORDS = (
    "is|was|or|and|but|not|then|nor|to|through|if|when|since|because|as|works|fits|holds|matches|seems|has|must|should|"
    "would|could|can|cannot|fails|are"
)
_ANGLED = re.compile(r"<([A-J])>(?=[ .]*$)", re.MULTILINE)
_OPENED = re.compile(r"[(\[{]([A-J])")
_LONE = re.compile(r"\(?([A-J])\)?\.?")
_LIST = re.compile(r"[)\]}]?(?:\s*(?:,(?:\s*(?:and|or|nor)\b)?|and|or|nor)\s*[(\[]?[A-J][)\]]?)+")
_MAX_CHARS = 2_000


def without_tags(text: str) -> str:
    """Write `<B>` at the end of a line as `(B)`, unless it is a tag that a later `</B>` closes."""
    if "<" not in text:
        return text
    tags = {letter for letter in "ABCDEFGHIJ" if f"</{letter}>" in text}
    return _ANGLED.sub(lambda match: match[0] if match[1] in tags else f"({match[1]})", text)


def choice_letter(text: str) -> str | None:
    """Return the option that a short text names, in upper case. None when it names none, or two."""
    text = _prepared(text[:_MAX_CHARS])
    if opened := _OPENED.fullmatch(text):
        return opened[1]
    if label := _LABEL.match(text):
        return _labeled(label)
    reason = _REASON.search(text)
    head, rest = (text[: reason.start()], text[reason.end() :]) if reason else (text, "")
    chosen = _stated(head)
    if len(chosen) != 1 or _ALTERNATIVE.search(rest) or _CONDITION.search(head):
        return _asserted(text) if not chosen else None
    return chosen.pop()


def sole_choice(text: str) -> str | None:
    """Return the option that a text without markers names, or None.

    The last line or the whole text must name it, a sentence must choose it and no other, or exactly one bracketed
    letter must occur in the text. Of rows `A: no`, `B: yes` at the end, the only one that agrees counts. Of other rows,
    which repeat the options or comment on them, the text before them counts.
    """
    if (rows := _rows(text)) is not None:
        agreed, denied, before = rows
        if agreed or not before.strip():
            return agreed[0] if len(agreed) == 1 and len(denied) > 0 else None
        letter = sole_choice(before)
        return None if letter in denied else letter
    last = _prepared(last_line(text)[-_MAX_CHARS:])
    if (label := _LABEL.match(last)) and (letter := _labeled(label)):
        return letter
    first, text = _prepared(text[-_MAX_CHARS:].strip().split("\n")[0]), _prepared(text[-_MAX_CHARS:])
    if opened := _OPENED.fullmatch(text):
        return opened[1]
    if (label := _LABEL.match(text)) and "\n" not in text:
        if not _DENIED_AFTER.match(label["rest"]) and not _WRONG.match(label["rest"]):
            return _labeled(label)
    if letter := _asserted(last) or _asserted(text):
        return letter
    if _mentions_in_assertions(text):
        return None  # of two options, or of one that is denied
    if (label := _LABEL.match(first)) and not label["rest"].strip():
        return _labeled(label)  # a letter on the first line, and no other option chosen after it
    if lone := _LONE.fullmatch(_SENTENCE.split(text)[-1].strip()):
        others = [m for m in _MENTION.finditer(text) if m["letter"] != lone[1]]
        if others and all(_is_denied(text, m) for m in others):
            return lone[1]
    bracketed = {m["letter"] for m in _MENTION.finditer(text) if m["open"] == "(" and m["close"] == ")"}
    denied = {m["letter"] for m in _MENTION.finditer(text) if _is_denied(text, m)}
    return bracketed.pop() if len(bracketed) == 1 and not bracketed & denied else None


def _rows(text: str) -> tuple[list[str], set[str], str] | None:
    """Return the options that the last lines agree to, those they deny, and the text before, one option a line.

    None when the last lines do not list options.
    """
    found: dict[str, str] = {}
    lines = text[-_MAX_CHARS:].strip().split("\n")
    while lines:
        label = _LABEL.match(_prepared(lines[-1]))
        if not label or (found and bool(label["rest"].strip()) != any(found.values())):
            break
        found.setdefault((label["bracketed"] or label["plain"]).upper(), label["rest"].strip())
        lines.pop()
    if len(found) < 2:
        return None
    agreed = [letter for letter, rest in found.items() if _YES.match(rest)]
    denied = {letter for letter, rest in found.items() if _NO.match(rest)}
    return agreed, denied, "\n".join(lines)


def _prepared(text: str) -> str:
    text = TEXT_COMMAND.sub(r"\1", markup.plain(text))
    if "?" in text:
        text = _QUESTION.sub(" ", text)
    if not text.isascii():
        first = _SIGN_OR_LETTER.search(text)
        for sign, words in _SIGNED[0 if first and first["sign"] else 1]:
            text = sign.sub(words, text)
    for latex in ("\\(", "\\)", "\\[", "\\]", "\\ ", "\\,", "\\;", "$"):
        text = text.replace(latex, " ")
    return markup.strip(" ".join(line for line in text.split("\n")) if len(text) < 40 else text)


def _labeled(label: re.Match[str]) -> str | None:
    """Return the letter of `B) Paris`. None for an article ('a dog'), a second letter, or a denial (`B is wrong`)."""
    rest = label["rest"]
    letter = label["bracketed"] or label["plain"]
    if letter.islower() and label["plain"] and rest.strip() and label.string[label.end("plain")] not in ").:":
        return None
    if _ANOTHER.match(rest) or _ALTERNATIVE.search(rest) or _DENIED_AFTER.match(rest) or _WRONG.match(rest):
        return None
    return str(letter.upper())


def _stated(head: str) -> set[str]:
    """Return the letters that a clause names and does not deny."""
    lower = re.fullmatch(rf"(?:{_NOUN}\s*:?\s*)?[(\[]?([a-j])[)\]]?", head.strip())
    if lower:
        return {lower[1].upper()}
    found = set()
    for mention in _MENTION.finditer(head):
        letter, bare = mention["letter"], not (mention["open"] or mention["close"])
        after = head[mention.end() :]
        if not (bare and _is_word(letter, after)) and not _is_denied(head, mention):
            found.add(letter)
    return found


def _is_word(letter: str, after: str) -> bool:
    """Return True for the article in `A dog`, the pronoun in `I think`, and the letter of a name such as `B cells`."""
    if re.match(r"\s+(?:cells?|flat|sharp|minor|major|movies?|students?|lists?)\b", after[:20]):
        return True
    return letter in "AI" and re.match(rf"\s+(?!(?:{_FUNCTION_WORDS})\b)[a-z]", after[:40]) is not None


def _is_denied(text: str, mention: re.Match[str]) -> bool:
    before, after = text[max(0, mention.start() - 40) : mention.start("letter")], text[mention.end("letter") :]
    if _DENIED_BEFORE.search(before.rstrip("([{")) or _DENIED_AFTER.match(after[:60]):
        return True
    together = _LIST.match(after[:60])
    rest = after[together.end() :] if together else ""
    if _DENIED_AFTER.match(rest[:60]) and not re.match(r"\W{0,3}(?:is|was|does|isn)", rest):
        return True  # 'A and C are wrong'
    return re.search(r"\bneither\b[^.]*\bnor\W{1,3}(?:option\W)?$", before, re.IGNORECASE) is not None


def _asserted(text: str) -> str | None:
    """Return the only option that the sentences of a text choose; a sentence that revises counts alone."""
    chosen: set[str] = set()
    for sentence in _SENTENCE.split(text):
        if sentence.rstrip().endswith("?"):
            continue
        letters = _mentions_in_assertions(sentence)
        if letters and _REVISION.search(sentence):
            chosen = set()
        chosen |= letters
    return chosen.pop() if len(chosen) == 1 and not _is_torn(text) else None


def _mentions_in_assertions(text: str) -> set[str]:
    found = set()
    for pattern in _ASSERTIONS:
        for match in pattern.finditer(text):
            letter, position = match["letter"], match.start("letter")
            if HYPOTHESIS.search(text[max(0, match.start() - 60) : match.start()]):
                continue
            bare = text[position - 1 : position] not in ("(", "[", "{")
            if letter.islower() and (bare and not match[0].lower().startswith(("option", "choice", "letter"))):
                continue
            if bare and _is_word(letter, text[position + 1 :]):
                continue
            if letter.islower() and re.match(r"[a-j][)\]]?[.!]?\s*(?:$|\n)", text[position:]):
                found.add(letter.upper())
                continue
            mention = _MENTION.match(text, position)
            if mention is not None and not _is_denied(text, mention):
                found.add(letter.upper())
                if also := re.match(
                    r"[)\]}]?\s*(?:,|/|&|and|or)\s*[(\[]?([A-J])\b(?!\s+(?:is|are|was)\b)", text[position + 1 :][:20]
                ):
                    found.add(also[1])
    return found


def _is_torn(text: str) -> bool:
    return (
        re.search(r"\b(?:either|both|between)\b[^.\n]{0,30}\b[A-J]\b[^.\n]{0,12}\b(?:or|and)\W{1,3}[A-J]\b", text)
        is not None
    )
