"""Labels: against the reference answer, given, and by majority."""

import pytest

from megatron_offgrpo.data.labelling import (
    LabelCounts,
    label_by_given,
    label_by_majority,
    label_by_math_verify,
    label_groups,
)
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


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("proof", "placeholder"),
        ("???", "no content"),
        ("See the proof above.", "prose"),
        (r"\frac{3}{", "unclosed brace"),
    ],
)
def test_a_reference_that_no_solution_can_match_is_refused_by_kind(pool, reference, kind):
    refused, kept = label_groups([make(reference, "a", r"\boxed{1}"), make("1", r"\boxed{1}")], ("math-verify",), pool)
    assert (refused.reason, refused.field) == (f"unreadable reference answer ({kind})", "answer")
    assert kept.rewards == (1.0,)


def test_an_unreadable_answer_has_its_status(pool):
    (labelled,) = label_by_math_verify([make("1/2", r"\boxed{0.6}", r"\boxed{x \oplus 1}")], pool)
    assert labelled.statuses == ("ok", "unreadable")


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


def test_the_first_label_that_a_group_can_have_is_its_reward(pool):
    with_gold = make("2", r"\boxed{2}", r"\boxed{3}", r"\boxed{3}", rewards=[0.0, 0.0, 1.0])
    without = make("", r"\boxed{2}", r"\boxed{3}", r"\boxed{3}", rewards=[0.0, 0.0, 1.0])
    first, second = label_groups([with_gold, without], ("math-verify", "majority", "given"), pool)
    assert (first.label, first.rewards) == ("math-verify", (1.0, 0.0, 0.0))
    assert (second.label, second.rewards) == ("majority", (0.0, 1.0, 1.0))
    # Whatever was chosen, every label asked for stands beside it.
    assert (first.verified, first.majority) == ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0))
    assert (second.verified, second.majority) == (None, (0.0, 1.0, 1.0))
    assert first.extracted == ("2", "3", "3")
    counts = LabelCounts()
    for one in (first, second):
        counts.add(one)
    found = counts.as_counts()
    assert found["label_sources"] == {"majority": 3, "math-verify": 3}
    assert found["agreement"] == {
        "given, math-verify": {"compared": 3, "agree": 1, "given 1, math-verify 0": 1, "given 0, math-verify 1": 1},
        "given, majority": {"compared": 6, "agree": 4, "given 1, majority 0": 0, "given 0, majority 1": 2},
        "math-verify, majority": {
            "compared": 3, "agree": 0, "math-verify 1, majority 0": 1, "math-verify 0, majority 1": 2,
        },
    }  # fmt: skip
    assert [line["trajectory"] for line in first.disagreements()] == [0, 1, 2]
    assert [line["trajectory"] for line in second.disagreements()] == [1]
    assert second.disagreements()[0] | {"given": 0.0, "majority": 1.0} == second.disagreements()[0]
    kept = first.keep([2, 0])
    assert (kept.rewards, kept.verified, kept.majority, kept.extracted) == (
        (0.0, 1.0), (0.0, 1.0), (1.0, 0.0), ("3", "2"),
    )  # fmt: skip


def test_a_group_that_can_have_no_label_says_why(pool):
    empty, unreadable, ungiven = make("", r"\boxed{2}"), make(r"\text{}", r"\boxed{2}"), make("2", "a", "b")
    no_gold, bad_gold = label_groups([empty, unreadable], ("math-verify", "given"), pool)
    assert (no_gold.reason, no_gold.field) == ("empty reference answer", "answer")
    assert (bad_gold.reason, bad_gold.field) == ("unreadable reference answer (empty)", "answer")
    (no_reward,) = label_groups([ungiven], ("given",), pool)
    assert no_reward.reason == "no reward given"
