"""Which trajectories and groups stand in which step."""

import numpy as np
import pytest

from megatron_offgrpo.planning.schedule import epoch_steps, ranges, select_members

OFFSETS = np.array([0, 3, 4, 6])


def test_ranges():
    got = ranges(np.array([5, 0, 9]), np.array([2, 0, 3]))
    assert got.tolist() == [5, 6, 9, 10, 11]


@pytest.mark.parametrize(
    ("count", "rule", "trajectories", "offsets"),
    [
        (None, "keep", [0, 1, 2, 3, 4, 5], [0, 3, 4, 6]),
        (None, "cycle", [0, 1, 2, 3, 4, 5], [0, 3, 4, 6]),
        (2, "keep", [0, 1, 3, 4, 5], [0, 2, 3, 5]),
        (2, "cycle", [0, 1, 3, 3, 4, 5], [0, 2, 4, 6]),
        (5, "cycle", [0, 1, 2, 0, 1, 3, 3, 3, 3, 3, 4, 5, 4, 5, 4], [0, 5, 10, 15]),
    ],
)
def test_members(count, rule, trajectories, offsets):
    got, got_offsets = select_members(OFFSETS, count, rule)
    assert got.tolist() == trajectories
    assert got_offsets.tolist() == offsets


def test_a_group_without_trajectories_stays_empty():
    got, offsets = select_members(np.array([0, 0, 2]), 3, "cycle")
    assert got.tolist() == [0, 1, 0]
    assert offsets.tolist() == [0, 0, 3]


def test_the_last_step_takes_what_remains():
    steps = epoch_steps(np.arange(7), seed=0, epoch=0, shuffle=False, groups_per_step=3)
    assert [step.tolist() for step in steps] == [[0, 1, 2], [3, 4, 5], [6]]


def test_epochs_are_shuffled_differently_and_repeatably():
    def order(seed, epoch):
        steps = epoch_steps(np.arange(20), seed=seed, epoch=epoch, shuffle=True, groups_per_step=8)
        return np.concatenate(steps).tolist()

    assert sorted(order(1, 0)) == list(range(20))
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(*key)) for key in ((1, 0), (1, 1), (2, 0), (0, 0))}) == 4
