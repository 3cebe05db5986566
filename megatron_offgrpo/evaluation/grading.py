r"""Scores of a solution: lenient (the final answer is right) and strict (and stands in a box after the thinking).

The lenient score is the label of the data step. The strict one also asks for the form that training asks for:
`\boxed{...}` after the thought. A text that ends inside a thought has no final part.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from string import ascii_uppercase
from typing import Literal

from megatron_offgrpo.data.answers import announced_answers, final_answer, last_box
from megatron_offgrpo.data.choices import chosen_letter
from megatron_offgrpo.data.grading import Grade, GradingPool
from megatron_offgrpo.data.judge import Judge
from megatron_offgrpo.data.references import reference_fault
from megatron_offgrpo.data.thinking import ThinkTags

CHUNK = 256
SHORT_TEXT = 200
"""So much is looked at of a text without any mark of an answer: it may be the letter and its option's text alone."""
Reason = Literal[
    "equal", "different", "no_box", "unclosed_think", "no_answer", "unreadable", "empty_gold", "unreadable_gold",
    "timeout", "out_of_memory", "crash",
]  # fmt: skip


@dataclass(frozen=True)
class Solution:
    """What is graded."""

    gold: str
    """Reference answer; a letter where there are choices."""
    text: str
    choices: int = 0
    """Number of options of a multiple-choice question; 0 for an open one."""
    thinking: bool = False
    """The prompt ended inside a thought."""
    problem: str = ""
    """Read by a judge alone."""


@dataclass(frozen=True)
class Scored:
    """Both scores of a solution."""

    lenient: int
    strict: int
    """1 where `lenient` is 1 and the answer stands in a box after the thinking."""
    extracted: str | None
    """The final answer as it was read; None where there is none."""
    reason: Reason
    status: str
    """`ok`, or why no comparison was made: see `Grade.status`."""
    has_box: bool
    """Whether the part after the thinking has a box that is not blank."""


def score(solutions: Iterable[Solution], pool: GradingPool, judge: Judge | None = None) -> Iterator[Scored]:
    """Scores in the order of the solutions, a chunk at a time; `judge` is asked about what no rule reads."""
    source = iter(solutions)
    while chunk := list(islice(source, CHUNK)):
        open_ones = [one for one in chunk if not one.choices]
        found = pool.grade((one.gold, one.text) for one in open_ones)
        if judge is not None:
            found = judge.settle([(one.problem, one.gold, one.text) for one in open_ones], found)
        grades = iter(found)
        for one in chunk:
            grade = letter_grade(one, pool.thinking) if one.choices else next(grades)
            yield _scored(one, grade, pool.thinking)


def _scored(one: Solution, grade: Grade, tags: ThinkTags) -> Scored:
    unclosed = tags.is_unclosed(one.text, one.thinking)
    has_box = not unclosed and last_box(tags.final_part(one.text)) is not None
    reason: str
    if grade.status not in ("ok", "judged"):
        reason = grade.status
    elif not grade.reward:
        reason = "different"
    else:
        reason = "equal" if has_box else "unclosed_think" if unclosed else "no_box"
    strict = int(grade.reward == 1 and has_box)
    return Scored(grade.reward, strict, grade.extracted, reason, grade.status, has_box)  # type: ignore[arg-type]


def letter_grade(one: Solution, tags: ThinkTags) -> Grade:
    """Reward 1 where the chosen letter is the right one.

    The letter is that of the last box after the thinking; without a box, that of `<answer>`, of the last "answer is X",
    "option X", 答案：X there, or of the whole text. A letter beyond the options is no answer.
    """
    part = tags.final_part(one.text)
    box = last_box(part)
    places = [box] if box is not None else [final_answer(part) or "", *announced_answers(part), part[:SHORT_TEXT]]
    letters = (chosen_letter(place) for place in places)
    chosen = next((letter for letter in letters if letter and letter in ascii_uppercase[: one.choices]), None)
    if chosen is None:
        return Grade(0, "no_answer", None)
    return Grade(int(chosen == one.gold), "ok", chosen)


def unreadable_golds(golds: Iterable[str]) -> dict[int, str]:
    """Positions of the reference answers that no solution could match, and why."""
    faults = ((index, reference_fault(gold)) for index, gold in enumerate(golds))
    return {index: kind for index, kind in faults if kind is not None}
