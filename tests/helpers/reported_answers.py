"""Answers of the kinds that users of verifiers reported as misjudged, labeled by what a reader says.

Each kind is a small template or a list, in both directions: texts a reader accepts, and texts that differ from them in
one thing that matters. `math`, `numeric`, `exact`, `multiple-choice` and `reasoning-gym` all occur.
"""

from __future__ import annotations

import json

R, W, A = "right", "wrong", "abstain"
LabeledAnswer = tuple[str, str, str, str]
"""(verifier, completion, reference answer, verdict)"""

WRAPPERS = (
    "Answer: **{}**.", "Answer: **{}.**", "**Answer:** {}.", "**Answer: {}**", "The answer is **{}**.",
    "So the answer is *{}*.", "The final answer is `{}`.", "Answer: _{}_.", "Answer: __{}__", "Answer: ***{}***!",
    "Answer: “{}”.", "### Answer: {}", "> **Answer**: {}", "Answer: <b>{}</b>.", "<answer> **{}**. </answer>",
    "**Final Answer**\n\n{}", "### Final answer:\n\n**{}**.", r"Answer: \(\text{{{}}}\).", r"\boxed{{\textbf{{{}}}}}",
    "The answer is: **{}**",
)  # fmt: skip
"""Ways in which chat models write an answer, whatever it is."""

THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<thinking>", "</thinking>"),
)
SUBJECTS = (
    # (verifier, right answer, wrong answer, a sentence that states the answer {} without a marker)
    ("math", "7", "5", "The result is {}."),
    ("numeric", "12", "30", "That makes {} in all."),
    ("exact", "Paris", "London", "{}"),
    ("multiple-choice", "C", "B", "({})"),
    ("reasoning-gym", "41", "14", "{}"),
)


def columns_of(verifier: str, answer: str) -> dict[str, str]:
    """Return the dataset columns that a verifier takes: for `reasoning-gym`, an entry whose answer is `answer`."""
    if verifier != "reasoning-gym":
        return {}
    entry = {"question": "20 + 21 = ?", "answer": answer, "metadata": {"source_dataset": "chain_sum"}}
    return {"gym_entry": json.dumps(entry)}


def _wrapped() -> list[LabeledAnswer]:
    found = []
    for verifier, right, wrong, _ in SUBJECTS:
        for wrapper in WRAPPERS:
            if verifier == "reasoning-gym" and ("text" in wrapper or "“" in wrapper):
                continue  # its scorers read plain text
            found.append((verifier, wrapper.format(right), right, R))
            found.append((verifier, wrapper.format(wrong), right, W))
    return found


def _thoughts() -> list[LabeledAnswer]:
    found = []
    for verifier, right, wrong, sentence in SUBJECTS:
        for start, end in THOUGHTS:
            guess = f"{start}Maybe \\boxed{{{wrong}}}. Answer: {wrong}\nNo.{end}\n\n"
            found += [
                (verifier, guess + sentence.format(right), right, R),
                (verifier, guess + sentence.format(right), wrong, W),
                (verifier, f"{start}Answer: {right}", right, W),
                (verifier, f"{start}Answer: {right}\n{end}", right, W),
            ]
        found += [
            (verifier, f"Answer: {wrong}\n</think>\n\nAnswer: {right}", right, R),  # the prompt opened the thought
            (verifier, f"<think>a</think>Answer: {wrong}<think>b</think>\nAnswer: **{right}**.", right, R),
            (verifier, f"<think>a</think>Hm.<think>Answer: {right}", right, W),
        ]
    return found


def _thousands() -> list[LabeledAnswer]:
    written = (r"10,\!000", r"10\,000", "10{,}000", "10,000", r"10\ 000", "10~000", "10\u202f000", r"10\;000")
    found = []
    for verifier in ("math", "numeric"):
        for text in written:
            found += [
                (verifier, rf"\boxed{{{text}}}", "10000", R),
                (verifier, "Answer: 10000", text, R),
                (verifier, f"Answer: ${text}$", "10", W),
                (verifier, f"Answer: {text}", "10001", W),
            ]
        found += [
            (verifier, r"\boxed{1,\!234,\!567.89}", "1234567.89", R),
            (verifier, r"\boxed{306,\!956.63}", "306956.63", R),
            (verifier, r"\boxed{12\,345\,678}", "12345678", R),
            (verifier, r"\boxed{12\,345\,678}", "12345", W),
            (verifier, r"The total is $1\,500$.", "1500", R),
            (verifier, r"The total is $1\,500$.", "500", W),
        ]
    found += [
        ("math", r"\boxed{100,\ 200}", "100200", W),
        ("math", r"\boxed{100,\ 200}", r"\{100, 200\}", R),
        ("numeric", r"\boxed{100,\,200}", "100200", W),
    ]
    return found


def _currency_and_units() -> list[LabeledAnswer]:
    right = (
        r"\boxed{\$18}", "Answer: $18", "Answer: $18.00.", "Answer: **$18**", "Answer: 18 dollars", "Answer: €18",
        "Answer: 18€", "Answer: 18 €.", "Answer: £18", "Answer: USD 18", "Answer: 18 USD", "Answer: US$18",
        "Answer: Rs. 18", r"\boxed{18\text{ cm}}", r"\boxed{18\,\mathrm{cm}}", r"\boxed{18~\text{m}^2}",
        r"\boxed{18\ \mathrm{m}^{2}}", "Answer: 18 m/s", "Answer: 18 miles per hour", "Answer: 18 cm²",
        r"Answer: $18^\circ$", "Answer: 18°", r"\boxed{18\,\text{km/h}}", "Answer: **18 km**.", "Answer: 18 kg.",
        "Answer: She has 18 apples left.", r"\boxed{18 \text{ square units}}", "Answer: 18 people",
    )  # fmt: skip
    wrong = (
        "Answer: $180", "Answer: 18 million dollars", r"\boxed{\$1.8}", "Answer: **$81**", "Answer: -18 dollars",
        r"\boxed{81\text{ cm}}", "Answer: 17 km.", "Answer: not 18", "Answer: more than 18", "Answer: at least 18 km",
        "Answer: between 17 and 18", "Answer: minus 18", "Answer: 18²", "Answer: 18 or 19",
    )  # fmt: skip
    return [
        *((verifier, text, "18", R) for verifier in ("math", "numeric") for text in right),
        *((verifier, text, "18", W) for verifier in ("math", "numeric") for text in wrong),
    ]


def _words() -> list[LabeledAnswer]:
    differ = (
        ("June 5", "May 5"), (r"\text{June 5}", r"\text{May 5}"), ("5", "May 5"), ("Team 2", "Group 2"),
        (r"\text{Team 2}", r"\text{Group 2}"), (r"\text{Figure } 2", "Option 2"),
        (r"\text{east } 5", r"\text{west } 5"),
        ("5 km east", "5 km west"), ("3 apples", "3 pears"), (r"3\text{ cm}", r"3\text{ m}"), ("5 miles", "5 km"),
        ("Room 12", "Floor 12"), ("March 14", "April 14"), ("14 March", "14 April"), ("7 p.m.", "7 a.m."),
        (r"4\text{ hours}", r"4\text{ minutes}"), ("10 dollars", "10 euros"), ("Chapter 3", "Verse 3"),
        ("2 thousand", "2 million"), ("Henry 8", "Louis 8"),
    )  # fmt: skip
    same = (
        ("May 5", "May 5"), ("May 5.", "May 5"), ("**May 5**.", r"\text{May 5}"), ("may 5", "May 5"),
        ("5 May", "May 5"), ("May 5th", "May 5"), ("Team 2", r"\text{Team } 2"), ("3 apples", "3"), ("3", "3 apples"),
        ("3 apples", "3 apples"), ("3 apple", "3 apples"), (r"3\text{ cm}", "3"), ("3", r"3\text{ cm}"),
        ("3 cm", r"3\text{ cm}"), ("5 meters", "5 m"), ("5 hours", "5"), ("She has 3 apples", "3 apples"),
        ("There are 12 pens in total", "12"), ("10 dollars", r"\$10"), ("the value is 9", "9"),
        ("2 million", "2000000"),
    )  # fmt: skip
    return [
        *(("math", f"Answer: {text}", gold, W) for text, gold in differ),
        *(("math", f"Answer: {text}", gold, R) for text, gold in same),
        ("exact", "Answer: June 5", "May 5", W),
        ("exact", "Answer: **New York City**.", "New York", W),
        ("exact", "Answer: Paris. It lies on the Seine.", "Paris", R),
        ("exact", "Answer: 'Yes'!", "yes", R),
        ("exact", "Answer: “No”.", "yes", W),
    ]


def _tiny_and_huge() -> list[LabeledAnswer]:
    same = (
        ("1e-9", "0.000000001"), ("2.5e-8", r"2.5 \times 10^{-8}"), ("0.00000012", "1.2e-7"), ("6.02e23", "6.02e23"),
        (r"6.02 \times 10^{23}", "6.02e23"), ("3e8", "300000000"), ("299792458.0", "299792458"),
        ("-4e-7", "-0.0000004"),
        ("3.33333333e19", r"100000000000000000000/3"), ("1e-12", "0.000000000001"),
    )  # fmt: skip
    differ = (
        ("1e-9", "2e-9"), ("0.0000001", "0.0000002"), ("1e-8", "0"), ("0", "1e-8"), ("-1e-9", "1e-9"),
        (r"1.5 \times 10^{-9}", r"1.6 \times 10^{-9}"), ("6.02e23", "6.03e23"), ("3e8", "3e9"),
        ("123456789012345678", "123456789012345679"), ("1234567.50", "1234567.00"), ("1e-12", "1e-13"),
    )  # fmt: skip
    return [
        *((verifier, f"Answer: {text}", gold, R) for verifier in ("math", "numeric") for text, gold in same),
        *((verifier, f"Answer: {text}", gold, W) for verifier in ("math", "numeric") for text, gold in differ),
        ("math", r"\boxed{10^{-9}}", r"10^{-10}", W),
        ("math", r"\boxed{\frac{1}{10^9}}", r"10^{-9}", R),
        ("math", r"\boxed{\frac{\pi}{10^8}}", r"\frac{\pi}{10^9}", W),
    ]


CHOSEN = (
    "{0}", "({0})", "{0}.", "{0})", "**{0}**", "**({0})**.", "`{0}`", "{0}: Paris", "{0}. Paris", "({0}) Paris",
    "{0} - Paris", "{0} is correct.", "{0} is the correct answer.", "Option {0} is correct.", "The answer is {0}.",
    "The answer is ({0}) because {1} is too small.", "The correct answer is **{0}**, not {1}.", "I choose {0}.",
    "I would go with option {0}.", "I'll pick ({0}).", "My answer is {0}.", "So the right choice is {0}.",
    "Therefore, {0}.", "Thus the answer must be {0}.", "It's {0}.", "It must be {0}.", "The best answer is {0}.",
    "The correct option is ({0}) Paris.", "Answer: {0}", "Answer: {0} (Paris)", "Answer: option {0}",
    "Answer: {0}, because {1} and {2} are even", "Answer: not {1} but {0}", "Answer: **Option {0}: Paris**",
    r"\boxed{{{0}}}", r"\boxed{{\text{{({0})}}}}", r"\boxed{{\textbf{{({0}) }}12}}", r"$\boxed{{\mathrm{{{0}}}}}$.",
    "{1} is wrong, so the answer is {0}.", "{1} and {2} are wrong. I choose {0}.", "Neither {1} nor {2}: it is {0}.",
    "The answer is {0}. {1} is incorrect.", "After checking {1} and {2}, the answer is choice {0}",
    "**Answer:** {0}) Paris", "The correct choice would be {0}.", "Hence ({0}).", "[{0}]", "[[{0}]]",
    "<answer>{0}</answer>", "Final answer: {0}!", "Answer:\n\n**{0}**",
)  # fmt: skip
UNDECIDED = (
    "Answer: {0} or {1}", "Answer: {0} and {1}", "Answer: {0}, {1}", "Answer: {0}/{1}", "{0} or {1}",
    "Either {0} or {1}.", "Both {0} and {1} are correct.", "Answer: ({0}) or ({1})", "The answer is either {0} or {1}.",
    "The answer is not {0}.", "It is not {0}.", "Answer: {0} {1}", r"\boxed{{{0}, {1}}}", "Answer: {0}. Or maybe {1}.",
    "The answer is {0} or possibly {1}.", "{0} is wrong.", "I am torn between {0} and {1}.", "({0}) ({1})",
    "Option {0} is incorrect.", "Answer: {0} & {1}", "Answer: {0}; {1}", "Answer: all of {0}, {1}, {2}",
    "Option {0} is correct. Option {1} is correct.", "Answer: neither {0} nor {1}",
)  # fmt: skip


def _choices() -> list[LabeledAnswer]:
    found = []
    letters = "ABCD"
    for i, template in enumerate(CHOSEN):
        gold, other, third = letters[i % 4], letters[(i + 1) % 4], letters[(i + 2) % 4]
        text = template.format(gold, other, third)
        found += [("multiple-choice", text, gold, R), ("multiple-choice", text, other, W)]
    for i, template in enumerate(UNDECIDED):
        gold, other, third = letters[(i + 3) % 4], letters[i % 4], letters[(i + 1) % 4]
        text = template.format(gold, other, third)
        found += [("multiple-choice", text, letter, W) for letter in (gold, other)]
    found += [
        ("multiple-choice", text, letter, W)
        for text, letter in (
            ("A dog barks.", "A"), ("I do not know.", "I"), ("Answer: a good question", "A"), ("I think so.", "I"),
            ("Answer: none of the above", "A"), ("A is a letter, B is another.", "A"), ("All of them", "A"),
        )
    ]  # fmt: skip
    found += [("multiple-choice", "Answer: B", gold, A) for gold in ("B or C", "Paris", "")]
    return found


_KINDS = (_wrapped, _thoughts, _thousands, _currency_and_units, _words, _tiny_and_huge, _choices)
REPORTED: tuple[LabeledAnswer, ...] = tuple(dict.fromkeys(case for kind in _KINDS for case in kind()))
"""All of these answers, without repetitions."""
