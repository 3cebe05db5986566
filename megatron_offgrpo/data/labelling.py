"""Rewards of trajectory groups: by math-verify against the reference answer, by majority, or given with the input."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from megatron_offgrpo.data.grading import Grade, GradingPool
from megatron_offgrpo.data.judge import Judge
from megatron_offgrpo.data.references import reference_fault
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data_config import LabelMode
from megatron_offgrpo.types import GroupRecord

LABELS: tuple[LabelMode, ...] = ("given", "math-verify", "majority")
Rewards = tuple[float | None, ...]
SHOWN_CHARACTERS = 160
"""Of the end of a solution on which labels disagree."""


@dataclass(frozen=True)
class LabelledGroup:
    """A group with a reward for each trajectory."""

    group: GroupRecord
    rewards: tuple[float, ...]
    """0 or 1."""
    statuses: tuple[str, ...]
    """Why: `given`, or the status of the grading (`ok`, `no_answer`, `timeout`, ...)."""
    label: LabelMode = "math-verify"
    """Where the rewards come from."""
    verified: Rewards | None = None
    """By math-verify; None where it was not asked for or the group has no readable reference answer."""
    majority: Rewards | None = None
    """By majority; None where it was not asked for."""
    extracted: tuple[str | None, ...] | None = None
    """The final answers."""

    def by(self, label: LabelMode) -> Rewards:
        """The rewards of one label; None for each trajectory that it does not have."""
        nothing: Rewards = (None,) * len(self.rewards)
        if label == "given":
            return tuple(one.reward for one in self.group.trajectories)
        return (self.verified if label == "math-verify" else self.majority) or nothing

    def disagreements(self) -> list[dict[str, Any]]:
        """The trajectories on which two labels differ, as lines of `disagreements.jsonl`."""
        labels: dict[str, Rewards] = {label: self.by(label) for label in LABELS}
        found = []
        for index in range(len(self.rewards)):
            own = {label: rewards[index] for label, rewards in labels.items() if rewards[index] is not None}
            if len(set(own.values())) > 1:
                trajectory = self.group.trajectories[index]
                found.append(
                    {
                        "where": self.group.origin,
                        "group_id": self.group.group_id,
                        "trajectory": index,
                        "sample_id": trajectory.sample_id,
                        **own,
                        "answer": self.group.answer,
                        "extracted": self.extracted[index] if self.extracted else None,
                        "status": self.statuses[index],
                        "end": trajectory.text[-SHOWN_CHARACTERS:],
                    }
                )
        return found

    def keep(self, indices: Sequence[int]) -> "LabelledGroup":
        """The group with these trajectories, in this order."""

        def taken(values: Any) -> Any:
            return None if values is None else tuple(values[index] for index in indices)

        return replace(
            self,
            group=replace(self.group, trajectories=taken(self.group.trajectories)),
            rewards=taken(self.rewards),
            statuses=taken(self.statuses),
            verified=taken(self.verified),
            majority=taken(self.majority),
            extracted=taken(self.extracted),
        )


@dataclass
class LabelCounts:
    """How the labels came about, and how they compare with each other."""

    statuses: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    """Label -> trajectories whose reward it is."""
    compared: Counter[str] = field(default_factory=Counter)
    """`one r, other s` -> trajectories with both labels."""

    def add(self, labelled: LabelledGroup) -> None:
        self.statuses.update(labelled.statuses)
        self.labels[labelled.label] += len(labelled.rewards)
        for one, other in combinations(LABELS, 2):
            for first, second in zip(labelled.by(one), labelled.by(other), strict=True):
                if first is not None and second is not None:
                    self.compared[f"{one} {first:.0f}, {other} {second:.0f}"] += 1

    def as_counts(self) -> dict[str, Any]:
        agreement = {}
        for one, other in combinations(LABELS, 2):
            counts = {f"{a}{b}": self.compared[f"{one} {a}, {other} {b}"] for a in (0, 1) for b in (0, 1)}
            if total := sum(counts.values()):
                agreement[f"{one}, {other}"] = {
                    "compared": total,
                    "agree": counts["00"] + counts["11"],
                    f"{one} 1, {other} 0": counts["10"],
                    f"{one} 0, {other} 1": counts["01"],
                }
        return {
            "labels": dict(sorted(self.statuses.items())),
            "label_sources": dict(sorted(self.labels.items())),
            "agreement": agreement,
        }


def label_groups(
    groups: Sequence[GroupRecord], labels: Sequence[LabelMode], pool: GradingPool, judge: Judge | None = None
) -> list[LabelledGroup | RecordError]:
    """Every group under the first of `labels` that it can have; the other labels asked for are kept beside it.

    Args:
        judge: who is asked about answers that math-verify's rules cannot read.

    Returns:
        for each group its labels, or why it can have none.
    """
    verified = label_by_math_verify(groups, pool, judge) if "math-verify" in labels else None
    majority = label_by_majority(groups, pool) if "majority" in labels else None
    result: list[LabelledGroup | RecordError] = []
    for index, group in enumerate(groups):
        by_verify = None if verified is None else verified[index]
        by_majority = None if majority is None else majority[index]
        own: dict[str, LabelledGroup | RecordError | None] = {"math-verify": by_verify, "majority": by_majority}
        if "given" in labels:
            own["given"] = _attempt_given(group)
        chosen = next((own[label] for label in labels if isinstance(own[label], LabelledGroup)), own[labels[0]])
        if isinstance(chosen, LabelledGroup):
            checked = by_verify.rewards if isinstance(by_verify, LabelledGroup) else None
            voted = by_majority.rewards if by_majority is not None else None
            answers = next((one.extracted for one in (by_verify, by_majority) if isinstance(one, LabelledGroup)), None)
            chosen = replace(chosen, verified=checked, majority=voted, extracted=answers)
        assert chosen is not None
        result.append(chosen)
    return result


def label_by_math_verify(
    groups: Sequence[GroupRecord], pool: GradingPool, judge: Judge | None = None
) -> list[LabelledGroup | RecordError]:
    """Reward 1 where the final answer equals the group's reference answer, which must be there and readable."""
    found = pool.grade((group.answer, one.text) for group in groups for one in group.trajectories)
    if judge is not None:
        asked = [(group.problem, group.answer, one.text) for group in groups for one in group.trajectories]
        found = judge.settle(asked, found)
    grades = iter(found)
    labelled: list[LabelledGroup | RecordError] = []
    for group in groups:
        own = [next(grades) for _ in group.trajectories]
        if not group.answer.strip():
            labelled.append(
                RecordError("empty reference answer", "answer", expected="a final answer", got=group.answer)
            )
        elif kind := reference_fault(group.answer):
            reason = f"unreadable reference answer ({kind})"
            labelled.append(RecordError(reason, "answer", expected="an answer to compare with", got=group.answer))
        else:
            labelled.append(_labelled(group, tuple(float(one.reward) for one in own), own, "math-verify"))
    return labelled


def _labelled(group: GroupRecord, rewards: tuple[float, ...], own: list[Grade], label: LabelMode) -> LabelledGroup:
    statuses, answers = tuple(one.status for one in own), tuple(one.extracted for one in own)
    verified, majority = (rewards, None) if label == "math-verify" else (None, rewards)
    return LabelledGroup(group, rewards, statuses, label, verified, majority, answers)


def label_by_given(group: GroupRecord) -> LabelledGroup:
    """The rewards that came with the group.

    Raises:
        RecordError: a trajectory has none.
    """
    rewards = tuple(one.reward for one in group.trajectories if one.reward is not None)
    if len(rewards) < len(group.trajectories):
        index = next(index for index, one in enumerate(group.trajectories) if one.reward is None)
        raise RecordError("no reward given", f"trajectories[{index}].reward", expected="0 or 1", got=None)
    return LabelledGroup(group, rewards, ("given",) * len(rewards), "given")


def _attempt_given(group: GroupRecord) -> LabelledGroup | RecordError:
    try:
        return label_by_given(group)
    except RecordError as error:
        return error


def label_by_majority(groups: Sequence[GroupRecord], pool: GradingPool) -> list[LabelledGroup]:
    """Reward 1 where the final answer is that of most trajectories of the group.

    Final answers are equal where math-verify says so; of equally frequent answers the one that comes first in the
    group wins. Trajectories without a final answer have no vote and reward 0.
    """
    extracted = iter(pool.extract(one.text for group in groups for one in group.trajectories))
    answers = [[next(extracted) for _ in group.trajectories] for group in groups]
    distinct = [list(dict.fromkeys(one.extracted for one in own if one.extracted is not None)) for own in answers]
    pairs = [(first, rf"\boxed{{{second}}}") for texts in distinct for first, second in combinations(texts, 2)]
    equal = iter(pool.grade(pairs))
    labelled = []
    for group, own, texts in zip(groups, answers, distinct, strict=True):
        same = {pair: next(equal).reward == 1 for pair in combinations(texts, 2)}
        labelled.append(_by_classes(group, own, _classes(texts, same)))
    return labelled


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
    return _labelled(group, tuple(float(head is not None and head == majority) for head in heads), own, "majority")
