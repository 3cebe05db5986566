"""Strict and lenient scores, letters, majorities."""

import pytest

from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.thinking import ThinkTags
from megatron_offgrpo.evaluation.grading import Solution, letter_grade, score, unreadable_golds
from megatron_offgrpo.evaluation.majority import Vote, majority_right


@pytest.fixture(scope="module")
def pool():
    with GradingPool(1) as pool:
        yield pool


CASES = [
    # text, prompt opens <think>, lenient, strict, reason
    ("<think>so</think> It is \\boxed{7}.", False, 1, 1, "equal"),
    ("It is \\boxed{7}.", False, 1, 1, "equal"),
    ("The answer is 7.", False, 1, 0, "no_box"),
    ("<think>\\boxed{7}</think> The answer is 7.", False, 1, 0, "no_box"),
    ("<think>I think \\boxed{7}", False, 1, 0, "unclosed_think"),
    ("I think \\boxed{7}", True, 1, 0, "unclosed_think"),
    ("so</think> \\boxed{7}", True, 1, 1, "equal"),
    ("\\boxed{8}", False, 0, 0, "different"),
    ("no idea", False, 0, 0, "no_answer"),
    ("", False, 0, 0, "no_answer"),
]


@pytest.mark.parametrize(("text", "thinking", "lenient", "strict", "reason"), CASES)
def test_scores(pool, text, thinking, lenient, strict, reason):
    (scored,) = score([Solution("7", text, thinking=thinking)], pool)
    assert (scored.lenient, scored.strict, scored.reason) == (lenient, strict, reason)


def test_order_is_kept_over_letters_and_open_questions(pool):
    mixed = [Solution("7", "\\boxed{7}"), Solution("B", "\\boxed{B}", 4), Solution("7", "\\boxed{8}")]
    assert [one.lenient for one in score(mixed * 200, pool)] == [1, 1, 0] * 200


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{(B)}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("\\boxed{\\textbf{(B) } 12}", "B"),
        ("\\boxed{B. the mitochondrion}", "B"),
        ("\\boxed{A} no, \\boxed{B}", "B"),
        ("<think>\\boxed{A}</think> The answer is (B).", "B"),
        ("The correct answer is **B**.", "B"),
        ("Answer: B", "B"),
        ("so option (A) is wrong. The answer is B because of it", "B"),
        ("The answer is A good question", None),
        ("the answer is I think unknown", None),
        ("\\boxed{12}", None),
        ("\\boxed{Benzene}", None),
        ("\\boxed{(B) and (D)}", None),
        ("\\boxed{(B) is not correct}", None),
        ("故选B，不选D。", "B"),
        ("The correct option is B.", "B"),
        ("Option B is correct.", "B"),
        ("B is the correct answer.", "B"),
        ("\\boxed{故选B}", "B"),
        ("\\boxed{E}", None),  # there are four options
        ("the answer is Because", None),
        ("", None),
    ],
)
def test_letters(text, letter):
    grade = letter_grade(Solution("B", text, choices=4), ThinkTags())
    assert (grade.extracted, grade.reward, grade.status) == (
        letter,
        int(letter == "B"),
        "ok" if letter else "no_answer",
    )


def test_a_letter_that_is_not_the_right_one_is_wrong():
    assert letter_grade(Solution("C", "\\boxed{B}", choices=4), ThinkTags()).reward == 0


def test_unreadable_reference_answers():
    golds = ["7", "$", "\\frac{1}{2}", " ", "proof", "\\frac{1}{"]
    assert unreadable_golds(golds) == {1: "empty", 3: "empty", 4: "placeholder", 5: "unclosed brace"}


def votes(*answers, right):
    return [Vote(answer, answer in right) for answer in answers]


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (("7", "7", "8"), ("7",), True),
        (("8", "7", "8"), ("7",), False),
        (("8", "7"), ("7",), False),  # equally frequent: the earlier one
        (("7", "8"), ("7",), True),
        ((None, None, "7"), ("7",), True),  # no answer, no vote
        ((None, None), (), False),
        (("8", "9", "7", "7"), ("7",), True),
        (("\\frac{1}{2}", "7", "7", "0.5", "\\frac{2}{4}"), ("7",), False),  # 1/2 three times
        (("\\frac{1}{2}", "7", "7", "0.4", "\\frac{2}{4}"), ("7",), False),  # 1/2 twice and earlier
        (("7", "\\frac{1}{2}", "14/2", "0.4", "\\frac{2}{4}"), ("7", "14/2"), True),  # right ones are one class
    ],
)
def test_majority_by_hand(pool, answers, right, expected):
    assert majority_right([votes(*answers, right=right)], pool, [False]) == [expected]


def test_letters_are_compared_as_they_stand(pool):
    assert majority_right([votes("A", "B", "B", right=("A",)), votes("A", "A", right=("A",))], pool, [True, True]) == [
        False,
        True,
    ]
