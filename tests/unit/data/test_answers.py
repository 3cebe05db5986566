"""Where the final answer stands."""

import time

import pytest

from megatron_offgrpo.data.answers import final_answer, last_box, reference_answer


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right\}}", r"\left\{x\right\}"),
        (r"\fbox{7}", None),
        (r"\boxed {7}", "7"),
        (r"\boxed{3} and cut \boxed{\frac{1}{", "3"),
        (r"\boxed{3} and \boxed{ }", "3"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\\boxed{6}", "6"),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"stray } and { before \boxed{8} after }", "8"),
        ("boxed{3}", None),
        ("no box", None),
        ("", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


def test_hostile_text_takes_linear_time():
    start = time.monotonic()
    assert last_box("\\boxed{" * 200_000) is None
    assert last_box("{" * 500_000 + "}" * 500_000) is None
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{2} and \boxed{7}", "2, 7"),
        (r"$\boxed{2}$, $\boxed{7}$ or $\boxed{9}$", "2, 7, 9"),
        (r"$x=\boxed{2}$ or $x_2 = \boxed{7}$", "2, 7"),
        (r"\boxed{2}\text{ and }\boxed{7}", "2, 7"),
        (r"\boxed{2} and \boxed{2}", "2"),
        (r"\boxed{2} \boxed{7}", "7"),
        (r"\boxed{2} apples and \boxed{7} pears", "7"),
        (r"\boxed{2}, which gives \boxed{7}", "7"),
        (r"\boxed{1}. Then \boxed{2} and \boxed{7}", "2, 7"),
        (r"\boxed 7, as 3+5=8", "7"),
        (r"\boxed\frac12 is it", r"\frac12"),
        (r"\boxed-12", "-12"),
    ],
)
def test_boxes_side_by_side_and_without_braces(text, box):
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<answer>3</answer> and \boxed{4}", "4"),
        (r"\fbox{4} <answer>3</answer>", "4"),
        ("<answer>3</answer>\n#### 5", "3"),
        ("<ANSWER> \n4\n </ANSWER>", "4"),
        ("The answer is 3.\n#### 5\nbye", "5"),
        ("The answer is 3. No, the answer is 5.", "5"),
        ("The answer is 3.5 meters. That is all.", "3.5 meters"),
        ("Final answer:\n\n\\[ x = 5 \\]\n", "x = 5"),
        ("The final answer is: $7$. I hope it is correct.", "$7$"),
        ("The answer to the question is 7, because 3 + 4 = 7.", "7"),
        ("The answer is C, not the option D.", "C"),
        ("The answer is 7, not 8.", "7"),
        ("The answer is not 7.", "not 7"),
        ("The correct option is C.", "C"),
        ("B is the correct answer.", "B is the correct answer"),
        ("D is not the correct answer.", None),
        ("The answer is C. Option D is wrong.", "C"),
        ("答案是7，因为3+4=7。", "7"),
        ("故选：B。", "B"),
        ("故选C，不选D。", "C"),
        ("故选C。不选D。", "C"),
        ("故选C，不是选D。", "C"),
        ("答案是C，而不是D。", "C"),
        ("【答案】7", "7"),
        ("**最终答案**：7", "7"),
        ("正确选项是C", "C"),
        ("答案就是7", "7"),
        ("#### Answer\n\nThe answer is 7.", "7"),
        ("#### Step 2: add 3 and 5\nThe answer is 7.", "7"),
        ("#### The key idea\nSo the answer is 7.", "7"),
        ("#### Answer\n\n7", None),
        ("#### 7 apples\nThanks!", "7 apples"),
        ("#### Amy", "Amy"),
        ("no number and no mark 7", None),
        ("This is not the answer: it is a question", None),
        ("", None),
    ],
)
def test_where_a_final_answer_is_announced(text, answer):
    assert final_answer(text) == answer


def test_hostile_text_without_a_box_takes_linear_time():
    start = time.monotonic()
    for piece in (
        "answer is ",
        "the answer to ",
        "$",
        "####",
        "#### Answer\n",
        "#### a word\nthe answer is not ",
        "<answer>",
        "答案",
        r"\boxed{1}, ",
        r"\boxed{1}",
        "_",
        "{",
        r"\text{",
    ):
        final_answer(piece * 50_000)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("7", "7"),
        (r"So \boxed{7}.", "7"),
        ("Tom has 3 cats.\nThe answer is 12 minus 5.\n#### 7", "7"),
        ("<answer>7</answer>", "7"),
        ("The answer is odd", "The answer is odd"),
    ],
)
def test_reference_answers(reference, answer):
    assert reference_answer(reference) == answer
