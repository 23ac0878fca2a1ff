"""Forms of answers that were misjudged after the labeled corpus was closed, each with a near miss."""

from __future__ import annotations

from reported_answers import LabeledAnswer

R, W = "right", "wrong"

FORMS: tuple[LabeledAnswer, ...] = (
    # groups of digits
    ("numeric", "Answer: 12'345.5", "12345.5", R), ("numeric", "Answer: 1\u2019234", "1234", R),
    ("math", "Answer: 1'234'567", "1234567", R), ("numeric", "Answer: 5'11", "511", W),
    ("numeric", "Answer: 12,34,567", "1234567", R), ("math", "Answer: 12,34,567", "1234567", R),
    ("math", "Answer: (1,23,456)", "(1, 23, 456)", R), ("math", "Answer: 1, 23, 456", "1,23,456", R),
    ("numeric", "Answer: \u20ac1.234,50", "1234.5", R), ("numeric", "Answer: 1.234", "1.234", R),
    ("numeric", "Answer: 1,234", "1234", R), ("numeric", "Answer: 1.234,50", "12345", W),
    # fractions of one character
    ("numeric", "Answer: \u00bd", "0.5", R), ("numeric", "Answer: 3\u00bd", "3.5", R),
    ("math", "Answer: 3\u00bd", "7/2", R), ("math", "Answer: 3\u00bd", "31/2", W),
    # numbers in words
    ("numeric", "Answer: **Forty-two**.", "42", R), ("numeric", "Answer: 8", "eight", R),
    ("math", r"\boxed{\text{seven}}", "7", R), ("math", "Answer: ten", "10", R), ("math", "Answer: one", "one", R),
    ("math", "Answer: Seven", "8", W), ("numeric", "Answer: no one", "1", W), ("exact", "Answer: one", "1", W),
    ("numeric", "Answer: one of them", "1", W), ("numeric", "Answer: twenty-twenty", "20", W),
    # what follows the number says no other
    ("numeric", "Answer: 7 (not 8)", "7", R), ("numeric", "Answer: 7, not 8", "8", W),
    ("math", "Answer: 7, not 8", "7", R), ("math", "Answer: 7, not 8", "8", W),
    ("numeric", "Answer: not 7, 8", "7", W), ("numeric", "Answer: not 7, not 8", "7", W),
    ("numeric", "Answer: 7 = 3 + 4", "7", R), ("numeric", "Answer: 7 = 3 + 4", "4", W),
    ("math", "Answer: 7 = 3 + 4", "7", R), ("numeric", "Answer: 5 = x - 2", "5", W),
    ("numeric", "Answer: x = 1/2", "0.5", R), ("numeric", "Answer: 3 = 3 = 4", "3", W),
    # units with powers
    ("numeric", r"Answer: 5\,\mathrm{m\,s^{-1}}", "5", R), ("numeric", "Answer: 9.8 m s^-2", "9.8", R),
    ("math", "Answer: 5 m s^{-1}", "5", R), ("numeric", "Answer: 5 x s^{-1}", "5", W),
    # a tag that the prompt opened
    ("numeric", "So\nit is 7</answer>", "7", R), ("exact", "Paris</answer>", "Paris", R),
    ("exact", "First\nParis </answer> done", "Paris", R), ("multiple-choice", "B</answer>", "B", R),
    ("numeric", "Answer: 7 </answer>", "7", R), ("numeric", "5</answer>7</answer>", "7", R),
    ("numeric", "5</answer>7</answer>", "5", W), ("exact", "A</answer>B</answer>", "A", W),
    # text
    ("exact", "Answer: [Paris]", "Paris", R), ("exact", "Answer: [5]", "5", W),
    ("exact", "Answer: **Yes**, it is.", "yes", R), ("exact", "Answer: No, it isn't.", "no", R),
    ("exact", "Answer: Yes, it is not.", "yes", W), ("exact", "Answer: Yes, but only at night.", "yes", W),
    ("exact", "Answer: No, wait, yes it is.", "no", W), ("exact", "Answer: 5:30 PM", "5:30 p.m.", R),
    ("exact", "Answer: 5:30 a.m.", "5:30 PM", W), ("math", "Answer: 5 pm", "5 p.m.", R),
    # choices
    ("multiple-choice", "Among the four, I find B most plausible.", "B", R),
    ("multiple-choice", "I find B less plausible.", "B", W),
    ("multiple-choice", "I find neither A nor B correct.", "B", W),
    ("multiple-choice", "A seems right, but actually B is correct.", "B", R),
    ("multiple-choice", "A seems right, but actually B is correct.", "A", W),
    ("multiple-choice", "A is right but B is also correct.", "A", W),
)  # fmt: skip
