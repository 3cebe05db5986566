"""The packings that the benchmark compares with: complete, within the limit, and as their papers work them out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.bench_packing import PACKINGS
from tools.packing_baselines import largest_differencing, modified_first_fit_decreasing


@pytest.mark.parametrize("name", sorted(PACKINGS))
@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_every_sequence_once_and_no_pack_over_the_limit(name, lengths):
    lengths = np.array(lengths, dtype=np.int64)
    packs = PACKINGS[name](lengths, 100)
    assert sorted(item for members in packs for item in members) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= 100 for members in packs)


def test_largest_differencing_by_hand():
    # 8-7 = 1, 6-5 = 1, 4-1 = 3, 3-1 = 2: the parts differ by 2, where the best would be 0 (8 + 7 against 6 + 5 + 4).
    lengths = np.array([4, 5, 6, 7, 8])
    assert sorted(int(lengths[part].sum()) for part in largest_differencing(lengths, 2)) == [14, 16]
    assert sorted(int(lengths[part].sum()) for part in largest_differencing(lengths, 5)) == [4, 5, 6, 7, 8]


def test_modified_first_fit_decreasing_by_hand():
    # C = 60: 31 and 32 open packs; 32 takes 28, the longest of (20, 30] that fits; 31 takes 27. FFD does the same
    # with 28 first, but then 15 and 14 (small) go: 60 - 32 - 28 = 0, 60 - 31 - 27 = 2, so they open a pack.
    lengths = np.array([31, 32, 28, 27, 15, 14])
    assert modified_first_fit_decreasing(lengths, 60) == [[1, 2], [0, 3], [4, 5]]
    # 35 leaves 25 for the two small ones, the shortest first: 11 and the longest that fits beside it, 13 of 13 and 15.
    lengths = np.array([35, 11, 13, 15])
    assert modified_first_fit_decreasing(lengths, 60) == [[0, 1, 2], [3]]
