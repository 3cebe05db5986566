"""Assignment: which data-parallel rank computes which packs of a step."""

import heapq
from itertools import combinations

import numpy as np
import numpy.typing as npt

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.types import FloatArray

BALANCED = 1e-3
"""Stop improving once the dearest rank is within this of the mean."""
EVEN = 1e-2
"""Equal counts are given up only where they leave the dearest rank further above the mean than this."""
MOST_PLACES_IN_PAIRS = 64
"""Ranks with more places than this swap packs one by one only, which balances so many."""
WORTH_MORE_PLACES = 5e-3
"""More zero-weight packs are accepted where they lower the dearest rank by this share of the mean."""


Index = tuple[int, npt.NDArray[np.int64]]
"""A rank and some of its places."""


def assign(pack_costs: npt.ArrayLike, dp: int, vpp_group: int = 1) -> list[list[int | None]]:
    """Spreads a step's packs over data-parallel ranks: nearly equal costs, and counts made equal by zero-weight packs.

    Dearest first, each to the cheapest rank with a free place (Graham 1969 with a limit on the count); then packs
    are swapped between the dearest rank and others as long as that lowers the dearer of the two and the dearest is more
    than 0.1 % over the mean, two for two where no swap of one helps and it is more than 1 % over. The limit is the mean
    count, rounded up; where that leaves the dearest rank more than 1 % over the mean (a few long trajectories among
    many short ones), twice as many places, and so on, as long as that helps: a rank with one dear pack then has fewer.

    Args:
        pack_costs: float [n], cost of each pack of the step, for example FLOPs.
        dp: number of data-parallel ranks.
        vpp_group: the count of each rank is a multiple of this; interleaved pipelines need the pipeline size.

    Returns:
        Per rank its packs, dearest first, as indices into pack_costs; None stands for a zero-weight pack.

    Raises:
        ConfigError: no rank, or a group below 1.
    """
    if dp < 1 or vpp_group < 1:
        raise ConfigError("needs at least one rank", where="layout", expected=">= 1", got=f"dp {dp}, group {vpp_group}")
    costs = np.asarray(pack_costs, dtype=np.float64)
    num_packs = len(costs)
    places = -(-num_packs // dp)
    best = _spread(costs, dp, places, vpp_group)
    while imbalance(costs, best) > EVEN and places < num_packs:
        places = min(2 * places, num_packs)
        wider = _spread(costs, dp, places, vpp_group)
        if imbalance(costs, wider) > imbalance(costs, best) - WORTH_MORE_PLACES:
            break
        best = wider
    return best


def _spread(costs: FloatArray, dp: int, places: int, group: int) -> list[list[int | None]]:
    """With at most `places` packs a rank; as many places as the fullest rank then has, in multiples of `group`."""
    num_packs = len(costs)
    # Zero-weight packs are packs of cost 0, numbered after the real ones.
    costs = np.concatenate([costs, np.zeros(dp * places - num_packs)])
    ranks: list[list[int]] = [[] for _ in range(dp)]
    cheapest = [(0.0, rank) for rank in range(dp)]
    for number in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(cheapest)
        ranks[rank].append(number)
        if len(ranks[rank]) < places:
            heapq.heappush(cheapest, (load + costs[number], rank))
    packs = _swap(np.array(ranks, dtype=np.int64).reshape(dp, places), costs)
    real = [sorted(row[row < num_packs].tolist(), key=lambda number: (-costs[number], number)) for row in packs]
    count = -(-max(map(len, real)) // group) * group
    return [[*row, *[None] * (count - len(row))] for row in real]


def imbalance(pack_costs: npt.ArrayLike, ranks: list[list[int | None]]) -> float:
    """Cost of the dearest rank over the mean cost, minus 1; 0 is perfect balance."""
    costs = np.asarray(pack_costs, dtype=np.float64)
    loads = np.array([sum(costs[number] for number in rank if number is not None) for rank in ranks])
    return float(loads.max() / loads.mean() - 1) if loads.mean() > 0 else 0.0


def _swap(packs: npt.NDArray[np.int64], costs: FloatArray) -> npt.NDArray[np.int64]:
    """Swaps packs of the dearest rank for as many of the cheapest rank that allows it, until BALANCED or stuck."""
    loads, places = costs[packs].sum(axis=1), np.arange(packs.shape[1])
    while loads.max() > (1 + BALANCED) * loads.mean():
        found = _exchange(packs, costs, loads, places[:, None])
        if found is None and loads.max() > (1 + EVEN) * loads.mean() and 1 < len(places) <= MOST_PLACES_IN_PAIRS:
            found = _exchange(packs, costs, loads, np.array(list(combinations(places, 2)), dtype=np.int64))
        if found is None:
            break
        mine, theirs = found
        packs[mine], packs[theirs] = packs[theirs], packs[mine]
        loads = costs[packs].sum(axis=1)
    return packs


def _exchange(
    packs: npt.NDArray[np.int64], costs: FloatArray, loads: FloatArray, sets: npt.NDArray[np.int64]
) -> tuple[Index, Index] | None:
    """Places of the dearest rank and as many of another one; exchanging their packs makes the dearer of both cheaper.

    Args:
        sets: int [n, k], the sets of k places of a rank to choose from.
    """
    dearest = int(loads.argmax())
    mine = costs[packs[dearest]][sets].sum(axis=1)
    for other in np.argsort(loads, kind="stable").tolist():
        gap = loads[dearest] - loads[other]
        theirs = costs[packs[other]][sets].sum(axis=1)
        order = np.argsort(theirs, kind="stable")
        # Giving away half the gap makes both equal: for each of the dearest rank's sets, the nearest partners.
        after = np.searchsorted(theirs[order], mine - gap / 2)
        partners = order[np.stack([np.maximum(after - 1, 0), np.minimum(after, len(order) - 1)])]
        moved = mine - theirs[partners]
        gain = np.minimum(moved, gap - moved)
        side, number = np.unravel_index(int(gain.argmax()), gain.shape)
        # Gains below rounding error would let two ranks swap for ever.
        if gain[side, number] > 1e-9 * loads[dearest]:
            return (dearest, sets[number]), (other, sets[partners[side, number]])
    return None
