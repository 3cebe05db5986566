"""Packs over data-parallel ranks: complete, equal counts, balanced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.assignment import _spread, assign, imbalance


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), max_size=40), st.integers(1, 6), st.integers(1, 4))
def test_every_pack_once_and_equal_counts(costs, dp, vpp_group):
    ranks = assign(costs, dp, vpp_group)
    assert len(ranks) == dp
    assert sorted(number for rank in ranks for number in rank if number is not None) == list(range(len(costs)))
    places = {len(rank) for rank in ranks}
    assert len(places) == 1
    (count,) = places
    assert count % vpp_group == 0
    # No more zero-weight packs than equal counts ask for, unless they make the ranks more even.
    assert len(costs) / dp <= count
    if count - vpp_group >= len(costs) / dp:
        equal = _spread(np.asarray(costs), dp, -(-len(costs) // dp), vpp_group)
        assert imbalance(costs, ranks) < imbalance(costs, equal)
    for rank in ranks:
        real = [costs[number] for number in rank if number is not None]
        assert rank[len(real) :] == [None] * (count - len(real))
        assert real == sorted(real, reverse=True)
    assert ranks == assign(costs, dp, vpp_group)


def test_by_hand():
    # 8 + 1 | 5 + 4
    assert assign([8, 5, 4, 1], 2) == [[0, 3], [1, 2]]
    assert imbalance([8, 5, 4, 1], [[0, 3], [1, 2]]) == 0
    # 9 against a mean of 6
    assert imbalance([8, 1, 2, 1], [[0, 1], [2, 3]]) == pytest.approx(0.5)
    assert assign([3.0], 3) == [[0], [None], [None]]
    assert assign([3, 2, 1], 1, 2) == [[0, 1, 2, None]]
    assert assign([], 2) == [[], []]
    assert imbalance([], [[], []]) == 0


def test_swaps_mend_what_dearest_first_leaves():
    # Dearest first: 9, 6, 5 = 20 against 7, 6, 5 = 18; a 6 for a 5 makes 19 and 19.
    costs = [9, 7, 6, 6, 5, 5]
    assert imbalance(costs, assign(costs, 2)) == 0


def test_two_packs_for_two_where_no_swap_of_one_helps():
    # Dearest first and its swaps end at 5 + 3 + 3 = 11 against 5 + 3 + 1 = 9; then 3 + 3 go for 5 and nothing.
    costs = [5, 5, 3, 3, 3, 1]
    assert imbalance(costs, assign(costs, 2)) == 0
    # 32 packs, which three ranks do not divide: two of 10.47 and one of 11.06 without it.
    costs = [1.6] * 6 + [0.97] * 20 + [0.5] * 6
    assert imbalance(costs, assign(costs, 3)) < 0.01


def test_a_dear_pack_takes_the_place_of_several():
    # Equal counts leave 6 + 1 + 1 against 3; the mean is 5.5.
    assert assign([6, 1, 1, 1, 1, 1], 2) == [[0, None, None, None, None], [1, 2, 3, 4, 5]]
    # Four places of a multiple of two.
    assert assign([3, 1, 1, 1], 2, 2) == [[0, None, None, None], [1, 2, 3, None]]
    # Nothing helps where one pack is dearer than the mean by itself and alone already.
    assert assign([9, 1], 2) == [[0], [1]]


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_balance_is_within_two_percent_with_eight_packs_a_rank(dp):
    generator = np.random.default_rng(dp)
    for _ in range(20):
        costs = generator.uniform(1.0, 1.5, 8 * dp)
        assert imbalance(costs, assign(costs, dp)) < 0.02


def test_large_steps_are_quick():
    costs = np.random.default_rng(0).uniform(1, 2, 20_000)
    assert imbalance(costs, assign(costs, 16)) < 1e-3


def test_no_rank_is_refused():
    with pytest.raises(ConfigError, match="layout"):
        assign([1.0], 0)
