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
    # scales and parts
    ("numeric", "Answer: $1.5k", "1500", R), ("math", "Answer: $1.5k", "1500", R), ("math", "Answer: $1.5k", "1.5", W),
    ("numeric", "Answer: 2 dozen eggs", "24", R), ("math", "Answer: 2 dozen", "24", R),
    ("numeric", "Answer: 2 dozen", "2", W), ("math", "Answer: 2 dozen", "2", W),
    ("numeric", "Answer: a dozen", "12", R),
    ("numeric", "Answer: half a dozen", "6", R), ("numeric", "Answer: $2B", "2", W),
    ("numeric", "Answer: \\$1.5M", "1500000", R), ("numeric", "Answer: $1.5 M", "1.5", W),
    ("numeric", "Answer: 3bn", "3", W), ("numeric", "Answer: 3 bn", "3000000000", R),
    ("numeric", "Answer: 5 lakh", "500000", R), ("math", "Answer: 2 crore", "2", W),
    ("numeric", "Answer: 10K USD", "10000", R), ("numeric", "Answer: 10 kg", "10", R),
    ("numeric", "Answer: 300 K", "300", R), ("numeric", "Answer: 5 m", "5", R), ("numeric", "Answer: 10 k", "10", W),
    ("numeric", "Answer: 5 tenths", "0.5", R), ("numeric", "Answer: 5 tenths", "5", W),
    ("math", "Answer: 2 thirds", "2", W), ("numeric", "Answer: 3 quarters", "3", R),
    ("numeric", "Answer: two-thirds", "2/3", R), ("math", "Answer: three quarters", "0.75", R),
    ("numeric", "Answer: 5\u2030", "5", W), ("numeric", "Answer: 50 pct", "0.5", R),
    # a variable at a number, a function of it, another base
    ("numeric", "Answer: x\u00bd", "0.5", W), ("math", "Answer: x\u00bd", "0.5", W),
    ("math", "Answer: x\u00bd", "x/2", R), ("numeric", "Answer: \u00bd x", "0.5", W),
    ("numeric", "Answer: it is 3\u00bd", "3.5", R), ("numeric", "Answer: 5 x", "5", W), ("math", "Answer: 5j", "5", W),
    ("numeric", "Answer: 5 x 10^3", "5000", R), ("numeric", "Answer: log 5", "5", W), ("math", "Answer: ln 5", "5", W),
    ("numeric", "Answer: 5 sin x", "5", W), ("numeric", "Answer: f(5)", "5", W),
    ("numeric", "Answer: f(5) = 7", "7", R),
    ("numeric", "Answer: 5 sec", "5", R), ("numeric", "Answer: 1010_2", "1010", W),
    ("math", "Answer: 1010 in binary", "1010", W), ("numeric", "Answer: 0x10", "0", W),
    ("math", "Answer: 0x10", "0", W),
    ("numeric", "Answer: 17_{10}", "17", R), ("numeric", "Answer: 3r2", "3", W),
    # signs, powers, repeating decimals
    ("numeric", "Answer: \u00b13", "3", W), ("math", "Answer: \u00b13", "3", W), ("numeric", "Answer: != 3", "3", W),
    ("numeric", "Answer: x >= 3", "3", W), ("numeric", "Answer: --5", "5", W), ("numeric", "Answer: 1.2.3", "1.2", W),
    ("numeric", "Answer: 3.4.2025", "3.4", W), ("numeric", "Answer: 5 5", "5", W), ("numeric", "Answer: 5; 5", "5", R),
    ("numeric", "Answer: 5\u00d710\u00b3", "5000", R), ("numeric", "Answer: 10\u207b\u00b3", "0.001", R),
    ("math", "Answer: 5\u00b2", "25", R), ("numeric", "Answer: 5\u00b2", "5", W),
    ("numeric", "Answer: 5\u00b710^3", "5000", R),
    ("math", "Answer: \u221e", "\u221e", R), ("math", "Answer: -\u221e", "\u221e", W),
    ("numeric", "Answer: 0.333...", "1/3", R), ("math", r"Answer: 0.1\overline{6}", "1/6", R),
    ("numeric", "Answer: 0.(3)", "1/3", R), ("numeric", "Answer: 0.(3)", "0.3", W),
    ("numeric", "Answer: 0.333...", "0.333", W), ("numeric", "Answer: 0.1212...", "4/33", W),
    # a bound, a denial or a calculation states another number
    ("numeric", "Answer: twice 5", "5", W), ("math", "Answer: half of 5", "5", W),
    ("numeric", "Answer: 5 squared", "5", W),
    ("numeric", "Answer: the square root of 5", "5", W), ("numeric", "Answer: 5 cm squared", "5", R),
    ("numeric", "Answer: 5 square units", "5", R), ("numeric", "Answer: 5th root of x", "5", W),
    ("numeric", "Answer: 5 degrees below zero", "5", W), ("numeric", "Answer: 5 or more", "5", W),
    ("math", "Answer: 5 apples at most", "5", W), ("numeric", "Answer: anything but 5", "5", W),
    ("numeric", "Answer: 5 is wrong", "5", W), ("numeric", "Answer: 5 answers are wrong", "5", R),
    ("numeric", "Answer: I doubt it is 5", "5", W), ("numeric", "Answer: no doubt 5", "5", R),
    ("numeric", "Answer: undefined at 5", "5", W), ("numeric", "Assume the answer is 5. The total is 7.", "5", W),
    ("numeric", "Assume the answer is 5. The total is 7.", "7", R),
    # boxes in a row are one answer
    ("math", r"\boxed{5} or \boxed{6}", "6", W), ("numeric", r"\boxed{5} and $\boxed{6}$", "6", W),
    ("math", r"\boxed{5}, \boxed{6}", "5,6", R), ("numeric", r"\boxed{5}. Then \boxed{6}", "6", R),
    ("multiple-choice", r"\boxed{A}, \boxed{C}", "C", W),
    # thoughts and text
    ("numeric", "<scratchpad>Answer: 5</scratchpad> It is 7.", "7", R),
    ("numeric", "<reflection>Answer: 5</reflection> It is 7.", "5", W), ("exact", "Answer: O\u2019Hara", "O'Hara", R),
    # a question chooses nothing
    ("multiple-choice", "B?", "B", W), ("multiple-choice", "Answer: (B)?", "B", W),
    ("multiple-choice", "Answer: **B**?", "B", W), ("multiple-choice", "The answer is B?", "B", W),
    ("multiple-choice", "B? C.", "C", R), ("multiple-choice", "Answer: B? No, C.", "C", R),
    ("multiple-choice", "B!", "B", R), ("multiple-choice", "B\u2026", "B", R),
    # conditions, names, lists of options
    ("multiple-choice", "The answer is B if x > 0.", "B", W), ("multiple-choice", "Answer: B unless x = 0", "B", W),
    ("multiple-choice", "Answer: B, if I am right.", "B", R),
    ("multiple-choice", "Assume it. Assume the answer is B.", "B", W),
    ("multiple-choice", "The least likely answer is B.", "B", W),
    ("multiple-choice", "The most likely answer is B.", "B", R),
    ("multiple-choice", "The answer is the opposite of B.", "B", W),
    ("multiple-choice", "They picked B, which is wrong.", "B", W),
    ("multiple-choice", "The answer is (B), but (C) is also plausible.", "B", W),
    ("multiple-choice", "Answer: Vitamin B", "B", W), ("multiple-choice", "Answer: B cells", "B", W),
    ("multiple-choice", "A. Paris\nB. London\nC. Rome\nD. Bonn", "D", W), ("multiple-choice", "A: 1\nB: 2", "B", W),
    ("multiple-choice", "A: no\nB: yes\nC: no", "B", R), ("multiple-choice", "A: no\nB: yes\nC: no", "C", W),
    ("multiple-choice", "A: too small\nB: it fits\n\nB", "B", R), ("multiple-choice", "B instead of C", "B", R),
    ("multiple-choice", "\u2705 B", "B", R), ("multiple-choice", "\u274c B", "B", W),
    ("multiple-choice", "B \u2717", "B", W),
)  # fmt: skip
