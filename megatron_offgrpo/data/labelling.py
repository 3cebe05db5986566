"""Rewards of trajectory groups: given ones, by math-verify against the reference answer, or by majority."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_offgrpo.data.grading import Grade, GradingPool
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.types import GroupRecord

DISAGREEMENTS = ("given_1_computed_0", "given_0_computed_1")
LabelMode = Literal["math-verify", "given", "majority"]


@dataclass(frozen=True)
class LabelledGroup:
    """A group with a reward for each trajectory."""

    group: GroupRecord
    rewards: tuple[float, ...]
    """0 or 1."""
    statuses: tuple[str, ...]
    """`given`, or the status of the grading."""


@dataclass
class LabelCounts:
    """How the labels came about, and how they compare with given ones."""

    statuses: Counter[str] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    """`given_g_computed_c` -> number of trajectories with both labels."""

    def add(self, labelled: LabelledGroup) -> None:
        self.statuses.update(labelled.statuses)
        for one, reward, status in zip(labelled.group.trajectories, labelled.rewards, labelled.statuses, strict=True):
            if one.reward is not None and status != "given":
                self.compared[f"given_{one.reward:.0f}_computed_{reward:.0f}"] += 1

    def as_counts(self) -> dict[str, Any]:
        differing = {name: self.compared[name] for name in DISAGREEMENTS}
        compared = self.compared.total()
        agreement = {"compared": compared, "agree": compared - sum(differing.values()), **differing}
        return {"labels": dict(sorted(self.statuses.items())), "agreement": agreement}


def label_by_math_verify(groups: Sequence[GroupRecord], pool: GradingPool) -> list[LabelledGroup]:
    """Reward 1 where the final answer equals the group's reference answer."""
    grades = iter(pool.grade((group.answer, one.text) for group in groups for one in group.trajectories))
    labelled = []
    for group in groups:
        own = [next(grades) for _ in group.trajectories]
        labelled.append(
            LabelledGroup(group, tuple(float(grade.reward) for grade in own), tuple(grade.status for grade in own))
        )
    return labelled


def label_by_given(group: GroupRecord) -> LabelledGroup:
    """The rewards that came with the group.

    Raises:
        RecordError: a trajectory has none.
    """
    rewards = tuple(one.reward for one in group.trajectories if one.reward is not None)
    if len(rewards) < len(group.trajectories):
        index = next(index for index, one in enumerate(group.trajectories) if one.reward is None)
        raise RecordError("no reward given", f"trajectories[{index}].reward", expected="0 or 1", got=None)
    return LabelledGroup(group, rewards, ("given",) * len(rewards))


def label_by_majority(groups: Sequence[GroupRecord], pool: GradingPool) -> list[LabelledGroup]:
    """Reward 1 where the final answer is that of most trajectories of the group.

    Final answers are equal where math-verify says so; of equally frequent answers the one that comes first in the
    group wins. Trajectories without a final answer have no vote and reward 0.
    """
    extracted = iter(pool.extract(one.text for group in groups for one in group.trajectories))
    answers = [[next(extracted) for _ in group.trajectories] for group in groups]
    distinct = [list(dict.fromkeys(one.extracted for one in own if one.extracted is not None)) for own in answers]
    pairs = [(first, rf"\boxed{{{second}}}") for texts in distinct for first, second in _pairs(texts)]
    equal = iter(pool.grade(pairs))
    labelled = []
    for group, own, texts in zip(groups, answers, distinct, strict=True):
        same = {pair: next(equal).reward == 1 for pair in _pairs(texts)}
        labelled.append(_by_classes(group, own, _classes(texts, same)))
    return labelled


def _pairs(texts: list[str]) -> list[tuple[str, str]]:
    return [(first, second) for index, first in enumerate(texts) for second in texts[index + 1 :]]


def _classes(texts: list[str], same: dict[tuple[str, str], bool]) -> dict[str, str]:
    """Each distinct answer -> the first answer that it equals (perhaps itself)."""
    first_of: dict[str, str] = {}
    for text in texts:
        heads = dict.fromkeys(first_of.values())
        first_of[text] = next((head for head in heads if same[head, text]), text)
    return first_of


def _by_classes(group: GroupRecord, own: list[Grade], first_of: dict[str, str]) -> LabelledGroup:
    heads = [None if one.extracted is None else first_of[one.extracted] for one in own]
    # most_common keeps the order of first appearance among equals.
    votes = Counter(head for head in heads if head is not None).most_common(1)
    majority = votes[0][0] if votes else None
    rewards = tuple(float(head is not None and head == majority) for head in heads)
    return LabelledGroup(group, rewards, tuple(one.status for one in own))
