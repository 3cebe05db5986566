"""maj@k: is the most frequent final answer of a problem's k samples the right one?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_offgrpo.data.grading import GradingPool


@dataclass(frozen=True)
class Vote:
    """One sample's final answer."""

    answer: str | None
    """None has no vote."""
    right: bool


def majority_right(problems: Sequence[Sequence[Vote]], pool: GradingPool, letters: Sequence[bool]) -> list[bool]:
    """For each problem whether its most frequent answer is right; of equally frequent answers the earliest one wins.

    Right answers are one class. Wrong ones are one class where math-verify says that they are equal (compared with the
    first of each class), and are compared only where they could outvote the right ones.

    Args:
        problems: the votes of each problem, in the order of its samples.
        letters: for each problem whether it is a multiple-choice question, whose answers are compared as they stand.
    """
    distinct = [[] if letter else _wrong_to_compare(votes) for votes, letter in zip(problems, letters, strict=True)]
    pairs = [(first, rf"\boxed{{{second}}}") for answers in distinct for first, second in _pairs(answers)]
    equal = iter(pool.grade(pairs)) if pairs else iter(())
    results = []
    for votes, answers in zip(problems, distinct, strict=True):
        same = {pair: next(equal).reward == 1 for pair in _pairs(answers)}
        results.append(_winner_is_right(votes, _heads(answers, same)))
    return results


def _wrong_to_compare(votes: Sequence[Vote]) -> list[str]:
    """The distinct wrong answers; none where merging them could not change who wins."""
    num_right = sum(vote.right for vote in votes)
    wrong = [vote.answer for vote in votes if vote.answer is not None and not vote.right]
    return list(dict.fromkeys(wrong)) if num_right and len(wrong) >= num_right else []


def _pairs(answers: list[str]) -> Iterator[tuple[str, str]]:
    return ((first, second) for index, first in enumerate(answers) for second in answers[index + 1 :])


def _heads(answers: list[str], same: dict[tuple[str, str], bool]) -> dict[str, str]:
    """Each answer -> the first answer of its class (perhaps itself)."""
    head_of: dict[str, str] = {}
    for answer in answers:
        heads = dict.fromkeys(head_of.values())
        head_of[answer] = next((head for head in heads if same[head, answer]), answer)
    return head_of


def _winner_is_right(votes: Sequence[Vote], head_of: dict[str, str]) -> bool:
    counts: dict[tuple[bool, str], int] = {}
    for vote in votes:
        if vote.answer is not None:
            name = (True, "") if vote.right else (False, head_of.get(vote.answer, vote.answer))
            counts[name] = counts.get(name, 0) + 1
    # Insertion order is order of appearance, and max keeps the first of equals.
    return max(counts, key=lambda name: counts[name])[0] if counts else False
