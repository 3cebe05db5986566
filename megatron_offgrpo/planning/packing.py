"""Packing: which sequences of one optimizer step share a pack."""

import heapq
from collections.abc import Sequence

import numpy as np

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.types import IntArray

PLURAL = {"trajectory": "trajectories", "group": "groups"}
FILL_SEARCH_LIMIT = 2048
"""Steps with more sequences than this are not searched beyond best fit, which reaches the bound on them in practice."""


def pack(
    lengths: IntArray, max_tokens: int, *, equal_parts: int = 1, names: Sequence[int] | IntArray | None = None
) -> list[list[int]]:
    """Packs the sequences of one step into as few packs as it can, and then as evenly as it can.

    The lower bound P on the number of packs is computed first. Longest-first into P packs, each sequence to the
    emptiest, gives nearly equal packs; where that overflows, best fit decreasing, and where that needs more than P,
    filling pack by pack with the largest reachable sum, decide the number of packs. Deterministic.

    Args:
        lengths: int [n], tokens.
        max_tokens: capacity of a pack.
        equal_parts: where there are this many packs or more, the sequences are first dealt into so many parts of nearly
            equal tokens, each of as many packs; data-parallel ranks that divide it then get equal shares. The packs
            get shorter, not emptier.
        names: store indices of the sequences, for the error message.

    Returns:
        Packs of positions 0 to n - 1, ascending in each pack; packs ascend by their first position.

    Raises:
        ConfigError: a sequence is longer than `max_tokens`.
    """
    require_fit(lengths, max_tokens, names)
    packs = _fewest(lengths, max_tokens)
    if 1 < equal_parts <= len(packs):
        packs = _in_equal_parts(lengths, max_tokens, equal_parts) or packs
    return sorted(sorted(members) for members in packs)


def _fewest(lengths: IntArray, max_tokens: int) -> list[list[int]]:
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    bound = lower_bound(lengths, max_tokens)
    packs = evenly(order, sizes, max_tokens, bound)
    if packs is None:
        packs = _best_fit(order, sizes, max_tokens)
        if len(packs) > bound and len(sizes) <= FILL_SEARCH_LIMIT:
            packs = min(packs, _fullest(order, sizes, max_tokens), key=len)
        packs = evenly(order, sizes, max_tokens, len(packs)) or packs
    return packs


def _in_equal_parts(lengths: IntArray, max_tokens: int, num_parts: int) -> list[list[int]] | None:
    """As many packs in each of `num_parts` parts of nearly equal tokens; None where a part has too few sequences.

    Packs of one length could not be dealt out evenly once a few long sequences have packs of their own; the parts can.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    parts = evenly(order, lengths.tolist(), int(lengths.sum()), num_parts) or []
    packed = [_fewest(lengths[part], max_tokens) for part in parts]
    count = max(map(len, packed))
    if len(parts) < num_parts or any(len(part) < count for part in parts):
        return None
    packs = []
    for part, members in zip(parts, packed, strict=True):
        sizes = lengths[part].tolist()
        packs += [[part[item] for item in pack] for pack in _split(members, sizes, count)]
    return packs


def pack_groups(
    lengths: IntArray,
    sizes: IntArray,
    max_tokens: int,
    *,
    equal_parts: int = 1,
    names: Sequence[int] | IntArray | None = None,
) -> list[list[int]]:
    """As `pack`, with whole groups: all members of a group share a pack.

    Args:
        lengths: int [n], tokens of the sequences, groups one after another.
        sizes: int [g], members of each group, all above 0.
        equal_parts: as in `pack`.
        names: store indices of the groups, for the error message.

    Raises:
        ConfigError: a group has more tokens than `max_tokens`.
    """
    starts = np.cumsum(sizes) - sizes
    group_tokens = np.add.reduceat(lengths, starts) if len(sizes) else lengths
    require_fit(group_tokens, max_tokens, names, what="group")
    return [
        [position for group in groups for position in range(starts[group], starts[group] + sizes[group])]
        for groups in pack(group_tokens, max_tokens, equal_parts=equal_parts)
    ]


def lower_bound(lengths: IntArray, max_tokens: int) -> int:
    """Packs that any packing needs: the best of Martello & Toth's bounds L2 over all thresholds (1990, section 8.3).

    For a threshold k <= C/2, sequences over C - k fill a pack alone, those over C/2 need one each, and the tokens of
    those from k to C/2 that find no room beside the latter need packs of their own. k = 0 gives ceil(tokens / C).
    """
    if len(lengths) == 0:
        return 0
    ascending = np.sort(lengths).astype(np.int64)
    sums = np.concatenate([[0], np.cumsum(ascending)])
    thresholds = np.unique(np.concatenate([[0], ascending[ascending <= max_tokens // 2]]))
    half = np.searchsorted(ascending, max_tokens // 2, side="right")
    small = np.searchsorted(ascending, thresholds, side="left")
    alone = np.searchsorted(ascending, max_tokens - thresholds, side="right")
    num_over_half = len(ascending) - half
    room = (alone - half) * max_tokens - (sums[alone] - sums[half])
    excess = np.maximum(0, sums[half] - sums[small] - room)
    return max(1, int((num_over_half + -(-excess // max_tokens)).max()))


def require_fit(
    lengths: IntArray, max_tokens: int, names: Sequence[int] | IntArray | None, what: str = "trajectory"
) -> None:
    """Refuses sequences that are longer than a pack."""
    too_long = np.flatnonzero(lengths > max_tokens)
    if len(too_long):
        worst = too_long[np.argmax(lengths[too_long])]
        name = int(worst if names is None else names[worst])
        raise ConfigError(
            f"{len(too_long)} {PLURAL[what]} of a step do not fit into a pack; the longest is {what} {name}",
            where="plan.max_pack_tokens",
            expected=f"at most {max_tokens} tokens of prompt and response",
            got=f"{int(lengths[worst])} tokens",
            remedy="raise plan.max_pack_tokens (more context parallelism makes room for it), or prepare the store "
            "with smaller --max-prompt-tokens or --max-response-tokens",
        )


def evenly(order: list[int], sizes: list[int], max_tokens: int, num_packs: int) -> list[list[int]] | None:
    """Longest first, each to the emptiest pack (Graham 1969); None where the emptiest pack overflows."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    loads = [(0, number) for number in range(num_packs)]
    for item in order:
        load, number = loads[0]
        if load + sizes[item] > max_tokens:
            return None
        heapq.heapreplace(loads, (load + sizes[item], number))
        packs[number].append(item)
    return [members for members in packs if members]


def _split(packs: list[list[int]], sizes: list[int], num_packs: int) -> list[list[int]]:
    """Halves the fullest pack of two sequences or more, again and again, until there are enough."""
    packs = [list(members) for members in packs]
    while len(packs) < num_packs:
        fullest = max(
            (number for number, members in enumerate(packs) if len(members) > 1),
            key=lambda number: sum(sizes[item] for item in packs[number]),
        )
        members = sorted(packs[fullest], key=lambda item: -sizes[item])
        packs[fullest : fullest + 1] = evenly(members, sizes, sum(sizes[item] for item in members), 2) or []
    return packs


def _best_fit(order: list[int], sizes: list[int], max_tokens: int) -> list[list[int]]:
    """Best fit decreasing: each to the fullest pack with room, found in a bit set of the packs' free tokens."""
    packs: list[list[int]] = []
    packs_with_room: dict[int, list[int]] = {}
    rooms = 0
    for item in order:
        size = sizes[item]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            number = packs_with_room[room].pop()
            if not packs_with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = max_tokens, len(packs)
            packs.append([])
        packs[number].append(item)
        packs_with_room.setdefault(room - size, []).append(number)
        rooms |= 1 << (room - size)
    return packs


def _fullest(order: list[int], sizes: list[int], max_tokens: int) -> list[list[int]]:
    """Pack by pack: the largest sequence left, then the subset of the rest that fills the pack best.

    The minimum bin slack heuristic of Gupta & Ho (1999) with subset sums as bit sets: bit s of reach[k] is set where
    some of the first k candidates, the largest first, add up to s.
    """
    left, packs = list(order), []
    while left:
        first, *candidates = left
        room = max_tokens - sizes[first]
        within = (1 << (room + 1)) - 1
        reach = [1]
        for item in candidates:
            reach.append((reach[-1] | reach[-1] << sizes[item]) & within)
            if reach[-1] >> room:
                break
        target = reach[-1].bit_length() - 1
        members = [first]
        for k in range(len(reach) - 1, 0, -1):
            if not reach[k - 1] >> target & 1:
                members.append(candidates[k - 1])
                target -= sizes[candidates[k - 1]]
        packs.append(members)
        taken = set(members)
        left = [item for item in left if item not in taken]
    return packs
