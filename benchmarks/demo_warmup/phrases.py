"""Wordings of the analysis of each kind of slip, a few per section.

A 135M model can learn to quote two lines and to say one thing about them, but not to write long texts. The bifurcation
therefore quotes the lines that differ, and each other section is one sentence without a number.

Fields of the bifurcation: `k` the step, `bad` and `good` the two lines, `written` the wrong answer. No wording for a
last step has `good`, because that line contains the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wording:
    """Wordings for one kind of slip."""

    verdict: tuple[str, ...]
    """Descriptions of the wrong line, used where the right line may not be quoted."""
    cause: tuple[str, ...]
    shield: tuple[str, ...]
    reflection: tuple[str, ...]
    rules: tuple[str, ...] = ()
    rules_up: tuple[str, ...] = ()
    """Rules for steps that add."""
    rules_down: tuple[str, ...] = ()
    """Rules for steps that take away."""


PARTING = (
    "They part at step {k}. The incorrect solution writes {bad}; the correct one writes {good}.",
    "Step {k} is where they part: {bad} in the incorrect solution, {good} in the correct one.",
)
"""Both solutions have a line at this step, and the right one is not the last."""

PARTING_AT_LAST = (
    "They part at step {k}, the last one. The incorrect solution writes {bad}, {verdict}.",
    "Step {k}, the last one, is where they part: {bad} in the incorrect solution, {verdict}.",
)
"""The right line is the last one and contains the answer."""

STOPS_EARLY = (
    "They part at step {k}. The incorrect solution has no such step; it stops too early.",
    "Step {k} is where they part: the incorrect solution leaves it out.",
)

CONTINUES = (
    "They part after the last step. The incorrect solution goes on and writes {bad}.",
    "The correct solution ends where the incorrect one goes on with {bad}.",
)

ONLY_ANSWER = (
    "They part at the answer line. The steps agree, but the incorrect solution answers {written}.",
    "The answer line is where they part: {written} in the incorrect solution, and not its last total.",
)

WORDINGS: dict[str, Wording] = {
    "miscounted": Wording(
        verdict=("which is not true", "which is a wrong total"),
        cause=(
            "The total was guessed, not counted.",
            "The line was written in haste, so it is not true.",
            "A guess took the place of counting.",
        ),
        shield=("The correct solution counted it out.", "The correct solution worked the line out."),
        reflection=(
            "I understand that a guessed total spoils all that follows, and I will count it out.",
            "I see that I must count each line before I write it.",
        ),
        rules_up=(
            "Count on: If a step adds, then I count up from the total one by one.",
            "Past ten: When adding passes a ten, I must fill up the ten first and then add the rest.",
        ),
        rules_down=(
            "Count back: If a step takes away, then I count down from the total one by one.",
            "Below ten: When taking away passes a ten, I must go down to the ten first and then take the rest.",
        ),
    ),
    "flipped": Wording(
        verdict=("which turns the sign around", "which has the wrong sign"),
        cause=(
            "The sign before the number was not read.",
            "Plus and minus were confused.",
        ),
        shield=("The correct solution read the sign with its number.", "The correct solution looked back at the sign."),
        reflection=(
            "I understand that the sign decides the step, and I will read it first.",
            "I see that I must look at the sign before each number.",
        ),
        rules_up=("Sign first: If the sign is plus, then the total must go up.",),
        rules_down=("Sign first: If the sign is minus, then the total must go down.",),
    ),
    "misread": Wording(
        verdict=("which uses another number", "which has a number that is not in the question"),
        cause=(
            "A number was misread.",
            "The number was taken from memory, not from the question.",
        ),
        shield=("The correct solution copied the number.", "The correct solution looked back at the question."),
        reflection=(
            "I understand that a misread number spoils the step, and I will look back.",
            "I see that I must copy each number from the question.",
        ),
        rules=(
            "Look back: When I take the next number, I must check that it stands in the question.",
            "Copy: If I write a number, then I copy it from the question.",
        ),
    ),
    "dropped": Wording(
        verdict=("which leaves a number out", "which skips a number"),
        cause=("A number of the question was left out.", "One step was skipped."),
        shield=("The correct solution used every number.", "The correct solution took the numbers in order."),
        reflection=(
            "I understand that every number counts, and I will use each one.",
            "I see that I must not skip a step.",
        ),
        rules=(
            "Every number: If a number stands in the question, then it needs a step.",
            "In order: When I end a step, I must check which number comes next.",
        ),
    ),
    "repeated": Wording(
        verdict=("which does a step twice",),
        cause=("A step was done twice.", "A number was used a second time."),
        shield=("The correct solution used every number once.", "The correct solution kept its place."),
        reflection=(
            "I understand that a number is used once, and I will keep my place.",
            "I see that I must not do a step twice.",
        ),
        rules=("Once only: If a number has had its step, then I go on to the next one.",),
    ),
    "stale": Wording(
        verdict=("which starts from an old total", "which forgets the last total"),
        cause=("The line starts from an old total.", "The last total was forgotten."),
        shield=("The correct solution went on from its last total.", "The correct solution kept the newest total."),
        reflection=(
            "I understand that a line starts with the last total, and I will carry it over.",
            "I see that I must go on from the newest total.",
        ),
        rules=(
            "Carry over: When I begin a line, I must check that it starts with the last total.",
            "Newest total: If I see two totals, then I go on with the newer one.",
        ),
    ),
    "unsigned": Wording(
        verdict=("which loses the minus sign", "which turns the order around"),
        cause=("The minus sign was lost below zero.", "The smaller number was taken from the larger."),
        shield=("The correct solution went below zero.", "The correct solution kept the order."),
        reflection=(
            "I understand that a total may fall below zero, and I will write the minus sign.",
            "I see that the order matters when I take away.",
        ),
        rules=(
            "Below zero: If I take away more than there is, then the total gets a minus sign.",
            "Keep the order: When I take away, I must check which number comes first.",
        ),
    ),
    "last_line": Wording(
        verdict=("which is not the last total",),
        cause=("The answer was not copied from the last line.", "The last line was written in haste."),
        shield=("The correct solution copied its last total.", "The correct solution looked back at its last line."),
        reflection=(
            "I understand that the answer is the last total, and I will copy it.",
            "I see that I must look back before I answer.",
        ),
        rules=(
            "Copy the end: When I write the answer, I must check that it is the last total.",
            "Same number: If the answer and the last total differ, then the answer is wrong.",
        ),
    ),
}
