"""Answers and numbers are read from completions exactly, or not at all."""

from __future__ import annotations

import pytest

from mel_lite.verify import numbers
from mel_lite.verify.extract import extract_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a \boxed{1} b \boxed{\frac{1}{2}} c", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"\boxed{} nothing", None),
        ("so #### 72\n", None),
        ("so\n#### 72\n", "72"),
        ("#### -1,000 apples", "-1,000 apples"),
        ("#### Step 3: compute\n4", None),
        ("#### 3. Compute\n4", None),
        ("Answer: 5\nThat is all.", "5"),
        ("**Answer:** 42", "42"),
        ("**Final Answer**\nAnswer:\n\n12", "12"),
        ("The final answer is $4$", "$4$"),
        ("<answer>1</answer> wait <answer> 2 </answer>", "2"),
        ("<answer>1</answer> then <answer>2", "1"),
        (r"<answer>Answer: \boxed{3}</answer>", "3"),
        ("Answer: 3\n" + r"so \boxed{4}", "4"),
        (r"\boxed{4}" + "\nAnswer: 3", "3"),
        ("the answer is 7", "7"),
        (r"\boxed{4}, and the answer is always positive", "4"),
        ("no marker: 4", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "value", "percent"),
    [
        ("$1,234.50", "2469/2", False),
        ("-$5", "-5", False),
        ("$-5", "-5", False),
        ("12%", "12", True),
        (r"12 \%", "12", True),
        (r"-\frac{1}{2}", "-1/2", False),
        (r"3\frac12", "7/2", False),
        ("2 3/4 cups", "11/4", False),
        ("1.5e3", "1500", False),
        (r"1.5\times 10^{-1}", "3/20", False),
        ("\uff14\uff12", "42", False),
        ("12{,}345", "12345", False),
        ("x = 3 = 3.0", "3", False),
    ],
)
def test_numbers_are_read_exactly(text: str, value: str, percent: bool) -> None:
    number = numbers.sole_number(text)
    assert number is not None
    assert (str(number.value), number.percent) == (value, percent)


@pytest.mark.parametrize(
    "text",
    ["3 or 4", "3, 4", "(1, 2)", "3^2", r"3\pi", r"\sqrt{4}", "<5", "5x", "1e9999", "9" * 500, "2+3", "no", "1/0"],
)
def test_texts_that_are_not_a_single_number(text: str) -> None:
    assert numbers.sole_number(text) is None
