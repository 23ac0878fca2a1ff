"""What an analysis says of each kind of slip, in several wordings per part.

Fields: `k` the step, `move` ("adding 5", "taking away 8"), `did`/`due` ("added"/"subtracted", wrongly and rightly),
`left` the total before the step, `bad` the wrong total, `good` the right one. No wording of a last step has `good`:
there it is the answer. Critique, reflection and heuristics hold no numbers at all.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wording:
    """The wordings for one kind of slip."""

    what: tuple[str, ...]
    """What went wrong at the step, with the wrong total."""
    habit: tuple[str, ...]
    cause: tuple[str, ...]
    shield: tuple[str, ...]
    insight: tuple[str, ...]
    rules: tuple[str, ...]
    rules_up: tuple[str, ...] = ()
    """Rules for steps that add."""
    rules_down: tuple[str, ...] = ()
    """Rules for steps that take away."""


RIGHT_TOTAL = (
    "There the running total is {good}.",
    "The right total after step {k} is {good}.",
    "After step {k} the total should be {good}, not {bad}.",
    "The correct solution has {good} there.",
)
"""Closes the bifurcation where the step is not the last one."""

LAST_TOTAL = (
    "Only this last step is wrong.",
    "All totals before it are right.",
    "Up to there both solutions agree.",
    "It is the last step, and {bad} is not the total.",
)
"""Closes the bifurcation where the step is the last one."""

WORDINGS: dict[str, Wording] = {
    "miscounted": Wording(
        what=(
            "Step {k}, {move}: from {left} the incorrect solution gets to {bad}.",
            "In step {k} the incorrect solution writes {bad} after {move} at {left}.",
            "They part at step {k}: {move} at {left} does not lead to {bad}.",
            "Step {k} starts from {left} and miscounts when {move}; it writes {bad}.",
        ),
        habit=(
            "The habit behind it is guessing a total.",
            "It guessed and did not count.",
            "Behind it is writing the first number that comes to mind.",
            "It trusted a hunch instead of counting.",
        ),
        cause=(
            "The root cause is a guessed total: the line is not a true equation.",
            "The line was never counted out, so it breaks the rule that each line must be true.",
            "A rough guess took the place of counting, and no check followed.",
            "The latent defect is haste: the sum was felt, not worked out.",
        ),
        shield=(
            "The correct solution counted on one by one and kept a true line.",
            "What protected the correct solution is that it worked the line out.",
            "The correct solution did the same step slowly and saw the true total.",
            "The correct solution checked its line before going on.",
        ),
        insight=(
            "I now understand that one guessed total spoils all that follows.",
            "I see that a line I did not count is a line I do not know.",
            "I understand that easy steps also need counting.",
        ),
        rules=(
            "Count it out: If a step feels easy, then I count from the total one by one before I write.",
            "Check back: When I write a new total, I must check that undoing the step gives the old total.",
            "True lines: When a line is written, I must check that both sides are equal.",
        ),
        rules_up=("Past ten: If adding passes a ten, then I fill up to the ten first and add the rest.",),
        rules_down=("Below ten: When taking away passes a ten, I must go down to the ten first, then take the rest.",),
    ),
    "flipped": Wording(
        what=(
            "Step {k}: the incorrect solution {did} where the question says {move}; from {left} it gets {bad}.",
            "At step {k} the sign is turned around: instead of {move} it {did} and wrote {bad}.",
            "They part at step {k}. It calls for {move}, but the incorrect solution {did}, giving {bad}.",
        ),
        habit=(
            "The habit is going on with the sign of habit, not the one written.",
            "It did not look at the sign before the number.",
            "Behind it is reading numbers and skipping signs.",
        ),
        cause=(
            "The root cause is a sign that was not read: it {did} where the number had to be {due}.",
            "Plus and minus were confused, which breaks the rule that the sign belongs to the number after it.",
            "The sign was taken from memory, not from the question.",
        ),
        shield=(
            "The correct solution read the sign together with its number.",
            "What protected the correct solution is that it looked back at the question for the sign.",
            "The correct solution {due} there, as the question says.",
        ),
        insight=(
            "I now understand that the sign before a number decides the step.",
            "I see that a sign is as important as the number.",
            "I understand that I must not guess the sign.",
        ),
        rules=(
            "Sign first: When I begin a step, I must check the sign before the number.",
            "Read in pairs: If I take the next number, then I take the sign before it too.",
            "Direction: If the sign is minus, then the total must go down; if it is plus, up.",
        ),
    ),
    "misread": Wording(
        what=(
            "Step {k}: the question says {move}, but the incorrect solution used another number and got {bad}.",
            "At step {k} a number was misread: it should be {move}, and {bad} comes from another number.",
            "They part at step {k}, where {move} is due; a wrong number was taken and led to {bad}.",
        ),
        habit=(
            "The habit is copying a number without looking.",
            "It wrote the number from memory.",
            "Behind it is a glance instead of a look at the question.",
        ),
        cause=(
            "The root cause is a misread number: the step uses one that is not in the question at this place.",
            "A number was changed on the way from the question to the line.",
            "It broke the rule that every number of a step comes from the question.",
        ),
        shield=(
            "The correct solution copied the number as it stands.",
            "What protected the correct solution is that it looked the number up again.",
            "The correct solution compared its line with the question.",
        ),
        insight=(
            "I now understand that right counting on a wrong number is still wrong.",
            "I see that copying is a step that needs care.",
            "I understand that I must look before I write.",
        ),
        rules=(
            "Copy exactly: When I write a number, I must check it against the question.",
            "Point at it: If I begin a step, then I find its number in the question first.",
            "Compare: When all steps are written, I must check that their numbers are those of the question.",
        ),
    ),
    "dropped": Wording(
        what=(
            "Step {k} is left out: {move} never happens, so the incorrect solution has {bad} there.",
            "At step {k} the incorrect solution skips {move} and goes on with {bad}.",
            "They part at step {k}: {move} is missing, which leaves {bad}.",
        ),
        habit=(
            "The habit is stopping to look at the question.",
            "It lost its place in the question.",
            "Behind it is rushing to the end.",
        ),
        cause=(
            "The root cause is a dropped number: one term was never used.",
            "It broke the rule that every number of the question gets its own step.",
            "The place in the question was lost, so one step is missing.",
        ),
        shield=(
            "The correct solution used every number once, in order.",
            "What protected the correct solution is one line for each number.",
            "The correct solution kept its place in the question.",
        ),
        insight=(
            "I now understand that the number of steps must fit the question.",
            "I see that a missing step cannot be repaired later.",
            "I understand that I am done only when every number is used.",
        ),
        rules=(
            "One line each: When I think I am done, I must check that every number has its line.",
            "Keep the place: If a step is written, then I go to the very next number.",
            "Count the steps: When I finish, I must check that there is one step per sign.",
        ),
    ),
    "repeated": Wording(
        what=(
            "Step {k} is done twice: after {move} once, the incorrect solution does it again.",
            "After step {k} the incorrect solution repeats {move}.",
            "They part right after step {k}: {move} is used a second time.",
        ),
        habit=("It lost its place in the question.", "The habit is not marking what is done."),
        cause=(
            "The root cause is a repeated number: one term was used two times.",
            "It broke the rule that every number is used once.",
        ),
        shield=(
            "The correct solution moved on after each number.",
            "What protected the correct solution is one line for each number.",
        ),
        insight=(
            "I now understand that a number that is used is done.",
            "I see that extra steps are as wrong as missing ones.",
        ),
        rules=(
            "Used is done: If a number has its line, then I must not use it again.",
            "Count the steps: When I finish, I must check that there is one step per sign.",
        ),
    ),
    "stale": Wording(
        what=(
            "Step {k}, {move}, does not start from the latest total {left} but from an older one, and gets {bad}.",
            "At step {k} the incorrect solution goes back to an old total; {move} must start from {left}, "
            "and it wrote {bad}.",
            "They part at step {k}: {move} was done on an earlier number instead of {left}, giving {bad}.",
        ),
        habit=(
            "The habit is forgetting the line just written.",
            "It did not carry the total over.",
            "Behind it is a look at the question where the last line was needed.",
        ),
        cause=(
            "The root cause is an old total: the latest line was ignored.",
            "It broke the rule that each line starts where the line before ended.",
            "The chain of totals was cut, so one step lost its effect.",
        ),
        shield=(
            "The correct solution started each line with the total of the line before.",
            "What protected the correct solution is that it carried the total over.",
            "The correct solution kept the chain unbroken.",
        ),
        insight=(
            "I now understand that only the latest total counts.",
            "I see that each line must hand its total to the next.",
            "I understand that an old total undoes my work.",
        ),
        rules=(
            "Carry over: When I begin a line, I must check that it starts with the last total.",
            "Chain: If a line ends with a total, then the next line starts with it.",
            "Latest only: If I see two totals, then I go on with the newer one.",
        ),
    ),
    "unsigned": Wording(
        what=(
            "Step {k}: {move} at {left} goes below zero, but the incorrect solution writes {bad} without the "
            "minus sign.",
            "At step {k} the minus sign is lost: {move} at {left} cannot give {bad}.",
            "They part at step {k}. From {left}, {move} ends below zero; {bad} comes from turning the order around.",
        ),
        habit=(
            "The habit is taking the smaller from the larger whatever the order.",
            "It turned the order around.",
            "Behind it is the hunch that totals are never negative.",
        ),
        cause=(
            "The root cause is a turned order: the smaller number was taken from the larger.",
            "The case below zero was missed, and with it the minus sign.",
            "It broke the rule that the order of a subtraction matters.",
        ),
        shield=(
            "The correct solution kept the order and wrote the minus sign.",
            "What protected the correct solution is that it expected a total below zero.",
            "The correct solution went down past zero.",
        ),
        insight=(
            "I now understand that a total may fall below zero.",
            "I see that order matters when I take away.",
            "I understand that a lost minus sign changes everything.",
        ),
        rules=(
            "Below zero: If I take away more than I have, then the total must get a minus sign.",
            "Keep the order: When I subtract, I must check which number comes first.",
            "Past zero: If the number taken away is larger, then I go down to zero and on below it.",
        ),
    ),
    "last_line": Wording(
        what=(
            "The steps are right, but the answer line says {bad}, which is not the last total.",
            "They part at the answer line: {bad} was written there and not the total of step {k}.",
            "All steps are right; after step {k} the wrong number {bad} was put in the answer line.",
        ),
        habit=(
            "The habit is answering without looking at the last line.",
            "It finished too early in the head.",
            "Behind it is relief at the end.",
        ),
        cause=(
            "The root cause is careless copying at the very end.",
            "It broke the rule that the answer is the last running total.",
            "The work was good and the report of it was not.",
        ),
        shield=(
            "The correct solution copied its last total.",
            "What protected the correct solution is a look back at the last line.",
        ),
        insight=(
            "I now understand that the answer line needs care too.",
            "I see that good steps are lost by a wrong last line.",
        ),
        rules=(
            "Copy the end: When I write the answer, I must check that it is the last total.",
            "Same number: If the answer and the last total differ, then the answer is wrong.",
        ),
    ),
}

REVIEW = (
    "I compared both solutions line by line.",
    "I review where my two solutions part.",
    "I went through my steps again.",
    "I look back at the line that went wrong.",
    "I put both solutions side by side.",
)
ACTION = (
    "I will check that line before I go on.",
    "I will slow down at this kind of step.",
    "Next time I will look at the question before each line.",
    "I will do this with every line from now on.",
    "From now on I will check before I write.",
)
