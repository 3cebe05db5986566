"""Labels: against the reference answer, given, and by majority."""

import pytest

from megatron_offgrpo.data.labelling import LabelCounts, label_by_given, label_by_majority, label_by_math_verify
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.types import GroupRecord, TrajectoryRecord


def make(answer, *texts, rewards=None):
    rewards = rewards or [None] * len(texts)
    return GroupRecord("g", "p", answer, tuple(TrajectoryRecord(*pair) for pair in zip(texts, rewards, strict=True)))


def test_math_verify(pool):
    groups = [make("2", r"\boxed{2}", r"\boxed{3}", ""), make("1/2", r"\boxed{0.5}")]
    first, second = label_by_math_verify(groups, pool)
    assert (first.rewards, first.statuses) == ((1.0, 0.0, 0.0), ("ok", "ok", "no_answer"))
    assert second.rewards == (1.0,)
    assert second.group is groups[1]


def test_given():
    labelled = label_by_given(make("", "a", "b", rewards=[0.0, 1.0]))
    assert (labelled.rewards, labelled.statuses) == ((0.0, 1.0), ("given", "given"))
    with pytest.raises(RecordError) as caught:
        label_by_given(make("", "a", "b", rewards=[0.0, None]))
    assert (caught.value.reason, caught.value.field) == ("no reward given", "trajectories[1].reward")


def test_majority_counts_equal_answers_together(pool):
    # 1/2, 2/4 and 0.5 are one answer with 3 votes, 3 has 2, one solution has no answer; the reference is not asked.
    texts = [r"\boxed{3}", r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{3}", "none", r"\boxed{\frac{2}{4}}"]
    tie = make("9", r"\boxed{7}", r"\boxed{8}", r"\boxed{8}", r"\boxed{7}")
    silent = make("9", "none", "nothing")
    one, two, three = label_by_majority([make("3", *texts), tie, silent], pool)
    assert one.rewards == (0.0, 1.0, 1.0, 0.0, 0.0, 1.0)
    assert one.statuses == ("ok", "ok", "ok", "ok", "no_answer", "ok")
    assert two.rewards == (1.0, 0.0, 0.0, 1.0)
    assert three.rewards == (0.0, 0.0)


def test_agreement_is_counted_where_both_labels_exist(pool):
    group = make("2", r"\boxed{2}", r"\boxed{2}", r"\boxed{3}", r"\boxed{3}", "", rewards=[1.0, 0.0, 1.0, 0.0, None])
    counts = LabelCounts()
    (labelled,) = label_by_math_verify([group], pool)
    counts.add(labelled)
    counts.add(label_by_given(make("", "a", rewards=[1.0])))
    assert counts.as_counts() == {
        "labels": {"given": 1, "no_answer": 1, "ok": 4},
        "label_sources": {"given": 1, "math-verify": 5},
        "agreement": {
            "given, math-verify": {"compared": 4, "agree": 2, "given 1, math-verify 0": 1, "given 0, math-verify 1": 1}
        },
    }
