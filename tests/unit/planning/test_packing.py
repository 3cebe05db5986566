"""Packs: complete, within the limit, few, even, deterministic."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning import packing
from megatron_offgrpo.planning.assignment import assign, imbalance
from megatron_offgrpo.planning.packing import lower_bound, pack
from tools.bench_packing import GROUPS_PER_STEP, read_lengths, tokens_computed

TRAJECTORIES = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "trajectories"

LENGTHS = st.lists(st.integers(0, 50), max_size=40)


def loads(lengths, packs):
    return [sum(lengths[i] for i in members) for members in packs]


@given(LENGTHS)
def test_every_sequence_once_and_no_pack_over_the_limit(lengths):
    packs = pack(np.array(lengths, dtype=np.int64), 50)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert all(load <= 50 for load in loads(lengths, packs))
    assert packs == sorted(sorted(members) for members in packs)
    assert packs == pack(np.array(lengths, dtype=np.int64), 50)


def minimum_packs(lengths, capacity):
    """By trying every assignment of each sequence to an open pack or a new one."""
    best = len(lengths)

    def place(index, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for number, room in enumerate(rooms):
            if room >= lengths[index]:
                place(index + 1, [*rooms[:number], room - lengths[index], *rooms[number + 1 :]])
        place(index + 1, [*rooms, capacity - lengths[index]])

    place(0, [])
    return best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_lower_bound_is_one_and_packs_are_the_fewest_for_few_sequences(lengths):
    best = minimum_packs(lengths, 20)
    assert lower_bound(np.array(lengths), 20) <= best
    assert len(pack(np.array(lengths), 20)) == best


@pytest.mark.parametrize(
    ("lengths", "bound"),
    [
        ([], 0),
        ([0, 0], 1),
        ([10], 1),
        ([10, 10, 10], 3),
        ([5, 5, 5], 2),  # 15 tokens
        ([6, 6, 6], 3),  # over half each, though 18 tokens would fit into two
        # 26 tokens, but with threshold 4 the 7s fill a pack each and the three 4s need two more.
        ([7, 7, 4, 4, 4], 4),
        # The 6 has room for one 4: 7 | 6, 4 | 4, 4 | 4.
        ([7, 6, 4, 4, 4, 4], 4),
    ],
)
def test_lower_bound_by_hand(lengths, bound):
    assert lower_bound(np.array(lengths, dtype=np.int64), 10) == bound


def test_packs_are_even():
    # 12 tokens into two packs of at most 10: 6 and 6, not 10 and 2.
    assert pack(np.array([4, 4, 2, 2]), 10) == [[0, 2], [1, 3]]


def test_best_fit_where_the_even_packing_overflows():
    # 5, 5 | 4, 3, 3: longest first to the emptiest gives 5, 4 | 5, 3 and no room for 3.
    packs = pack(np.array([5, 5, 4, 3, 3]), 10)
    assert packs == [[0, 1], [2, 3, 4]]


def test_packs_are_even_where_more_than_the_bound_are_needed():
    # 19 tokens need two packs, but no two packs hold 4, 4, 4, 4 and 3. Best fit leaves 8 | 8 | 3.
    lengths = np.array([4, 4, 4, 4, 3])
    assert lower_bound(lengths, 10) == 2
    assert sorted(loads(lengths, pack(lengths, 10))) == [4, 7, 8]


def test_filling_pack_by_pack_where_best_fit_needs_one_more():
    # Best fit decreasing: 6, 4 | 5, 4 | 3, 2, 2, 2 | 2. The same 30 tokens also fit 6, 4 | 5, 3, 2 | 4, 2, 2, 2.
    lengths = np.array([6, 5, 4, 4, 3, 2, 2, 2, 2])
    order = np.argsort(-lengths, kind="stable").tolist()
    assert len(packing._best_fit(order, lengths.tolist(), 10)) == 4
    assert len(packing._fullest(order, lengths.tolist(), 10)) == 3
    assert len(pack(lengths, 10)) == 3


@given(LENGTHS)
def test_the_search_is_complete_and_within_the_limit(lengths):
    order = np.argsort(-np.array(lengths, dtype=np.int64), kind="stable").tolist()
    for search in (packing._best_fit, packing._fullest):
        packs = search(order, lengths, 50)
        assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
        assert all(load <= 50 for load in loads(lengths, packs))


def test_a_full_step_reaches_the_bound_with_even_packs():
    lengths = np.random.default_rng(0).integers(200, 3000, 256)
    packs = pack(lengths, 8192)
    assert len(packs) == lower_bound(lengths, 8192) == -(-lengths.sum() // 8192)
    filled = loads(lengths.tolist(), packs)
    assert max(filled) - min(filled) < 0.05 * 8192


@settings(deadline=None)
@given(st.lists(st.integers(0, 100), max_size=40), st.integers(2, 9))
def test_equal_parts_keep_every_sequence_and_the_limit(lengths, parts):
    lengths = np.array(lengths, dtype=np.int64)
    fewest, packs = len(pack(lengths, 100)), pack(lengths, 100, equal_parts=parts)
    assert sorted(item for members in packs for item in members) == list(range(len(lengths)))
    assert all(lengths[members].sum() <= 100 and members for members in packs)
    # Fewer packs than parts would become much shorter.
    assert len(packs) == fewest if fewest < parts else len(packs) % parts == 0 or len(packs) == fewest


def test_equal_parts_by_hand():
    # Two packs of 20 and 20 hold these; alone, one rank would get 20 + 12 and the other 8 + 20. In two parts of 30:
    # 20 + 10 and 10 + 10 + 5 + 5, each of two packs.
    lengths = np.array([20, 10, 10, 10, 5, 5])
    packs = pack(lengths, 20, equal_parts=2)
    tokens = sorted(int(lengths[members].sum()) for members in packs)
    assert tokens == [10, 15, 15, 20]
    assert len(pack(lengths, 20)) == 3
    # Three packs are fewer than four parts.
    assert pack(lengths, 20, equal_parts=4) == pack(lengths, 20)


def test_equal_parts_can_be_dealt_out_evenly_where_packs_of_one_length_cannot():
    # 21 full packs on four ranks: one has six where the mean is 5.25.
    lengths = np.array([100] * 3 + [10] * 180)
    assert imbalance(*_dealt(pack(lengths, 100), lengths, 4)) == pytest.approx(6 / 5.25 - 1)
    assert imbalance(*_dealt(pack(lengths, 100, equal_parts=16), lengths, 4)) < 0.02


def _dealt(packs, lengths, dp):
    costs = [lengths[members].sum() for members in packs]
    return costs, assign(costs, dp)


def test_halving_the_fullest_pack():
    sizes = [5, 4, 3, 9, 1]
    # 12 is the fullest: 5 | 4 + 3; then 9 stands alone and cannot be halved, 7 can.
    assert packing._split([[0, 1, 2], [3], [4]], sizes, 4) == [[0], [1, 2], [3], [4]]
    assert packing._split([[0, 1, 2], [3], [4]], sizes, 5) == [[0], [1], [2], [3], [4]]


def test_a_sequence_longer_than_a_pack_is_named():
    with pytest.raises(ConfigError) as caught:
        pack(np.array([3, 12, 11]), 10, names=np.array([40, 41, 42]))
    message = str(caught.value)
    assert "2 trajectories" in message
    assert "trajectory 41" in message
    assert "12 tokens" in message
    assert "max_pack_tokens" in message


@pytest.mark.parametrize("max_tokens", [8192, 32768])
@pytest.mark.parametrize("name", ["amc23", "gsm8k", "math500"])
def test_fill_on_real_lengths(name, max_tokens):
    """At least 99 % of the tokens computed are real, in as few packs as any packing needs."""
    file = TRAJECTORIES / f"{name}.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"needs the fixture {file.name}, which is not part of the repository")
    data = read_lengths(file)
    lengths = np.minimum(data.tokens, max_tokens)
    for group in range(0, len(data.offsets) - 1, GROUPS_PER_STEP):
        end = min(group + GROUPS_PER_STEP, len(data.offsets) - 1)
        step = lengths[data.offsets[group] : data.offsets[end]]
        packs = pack(step, max_tokens)
        assert len(packs) == lower_bound(step, max_tokens)
        assert step.sum() >= 0.99 * tokens_computed(step, packs, one_length=False)
