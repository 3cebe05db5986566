"""The released order, worked out by hand."""

import pytest

from megatron_offgrpo.data.selection import balanced, released_order, select


@pytest.mark.parametrize(
    ("rewards", "num_kept", "kept"),
    [
        ([1, 1, 0, 0], 4, [0, 2, 1, 3]),
        ([0, 0, 1, 1], 4, [2, 0, 3, 1]),
        ([0, 1, 1, 1, 0, 1], 4, [1, 0, 2, 4]),
        ([1, 1, 1, 0, 1], 4, [0, 3, 1, 2]),
        ([0, 0, 1, 0], 3, [2, 0, 1]),
        ([1, 1, 1], 2, [0, 1]),
        ([0, 0, 0], 8, [0, 1, 2]),
        ([0, 1], 8, [1, 0]),
        ([1, 0, 1], 1, [0]),
    ],
)
def test_released_order(rewards, num_kept, kept):
    assert released_order(rewards, num_kept) == kept


@pytest.mark.parametrize(
    ("rewards", "num_kept", "kept"),
    [
        ([1, 1, 1, 0, 1, 0], 4, [0, 3, 1, 5]),
        ([1, 1, 1, 0], 4, [0, 3]),
        ([0, 0, 1], 8, [2, 0]),
        ([1, 0, 1, 0], 3, [0, 1]),
        ([1, 1, 1], 2, [0, 1]),
        ([0, 0], 8, [0, 1]),
        ([1, 0], 1, [0]),
    ],
)
def test_balanced(rewards, num_kept, kept):
    assert balanced(rewards, num_kept) == kept


def test_random_depends_on_seed_and_group_alone():
    rewards = [0] * 16
    chosen = select(rewards, 8, "random", seed=3, group_id="g")
    assert chosen == select(rewards, 8, "random", seed=3, group_id="g")
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 8
    assert max(chosen) < 16
    others = [select(rewards, 8, "random", seed=seed, group_id=name) for seed, name in ((4, "g"), (3, "h"))]
    assert chosen not in others
    assert select([0, 1], 8, "random", seed=0, group_id="g") == [0, 1]
    # Each of 16 is kept in half of the draws: 2000 draws, standard deviation 22.
    counts = [0] * 16
    for seed in range(2000):
        for index in select(rewards, 8, "random", seed=seed, group_id="g"):
            counts[index] += 1
    assert all(abs(count - 1000) < 130 for count in counts)
    assert select([0, 1, 1], 2, "released", seed=0, group_id="g") == [1, 0]
    assert select([0, 1, 1], 2, "balanced", seed=0, group_id="g") == [1, 0]
