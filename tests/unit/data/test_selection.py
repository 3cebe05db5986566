"""The released order, worked out by hand."""

import pytest

from megatron_offgrpo.data.selection import released_order


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
