"""Shared prompts: a pack has a group's prompt once, and each of the group's responses there continues it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_offgrpo.config import PlanConfig
from megatron_offgrpo.planning.assignment import assign, imbalance
from megatron_offgrpo.planning.members import Members
from megatron_offgrpo.planning.packing import evenly, pack, require_fit
from megatron_offgrpo.types import BoolArray, IntArray

MARGIN = 0.05
"""`auto` shares prompts where that can save at least this share of the tokens."""
PARTS_OF_A_PACK = (1, 2, 4, 8)
"""Groups longer than a pack over one of these are cut, to fill packs and balance ranks; see `pack_sharing`."""


def shares_prompts(plan: PlanConfig, members: Members, max_tokens: int) -> bool:
    """Whether this plan lays groups with shared prompts: as `plan.share_prompts` says.

    `auto` looks at the most that sharing can save in an epoch, with every group in the fewest packs that hold it:

        sum over groups of (members - packs) * prompt  >=  0.05 * tokens
        packs = ceil(responses / (max_tokens - prompt)), at least 1

    It depends on the groups alone and not on the packs, so that plan and reference pass decide alike.
    """
    if plan.share_prompts != "auto":
        return plan.share_prompts == "always"
    groups = members.groups
    starts, sizes = members.offsets[groups], np.diff(members.offsets)[groups]
    prompts = members.prompt_tokens[starts]
    responses = np.add.reduceat(members.response_tokens, starts) if len(starts) else starts
    packs = np.clip(-(-responses // np.maximum(max_tokens - prompts, 1)), 1, sizes)
    return int(((sizes - packs) * prompts).sum()) >= MARGIN * int(members.tokens.sum())


def continuing(group: IntArray, pack: npt.NDArray[np.signedinteger]) -> BoolArray:
    """[N] whether an entry has the group and the pack of the entry before it."""
    same = np.zeros(len(group), dtype=np.bool_)
    same[1:] = (group[1:] == group[:-1]) & (pack[1:] == pack[:-1])
    return same


def added_tokens(tokens: IntArray, prompts: IntArray, group: IntArray, pack: npt.NDArray[np.signedinteger]) -> IntArray:
    """[N] tokens that each entry adds to its pack: no prompt where it shares that of the entry before it."""
    return tokens - np.where(continuing(group, pack), prompts, 0)


def pack_sharing(
    tokens: IntArray,
    prompts: IntArray,
    sizes: IntArray,
    max_tokens: int,
    *,
    equal_parts: int = 1,
    names: Sequence[int] | IntArray | None = None,
) -> list[list[int]]:
    """As `pack`, with a prompt counted once for all members of its group in a pack.

    Whole groups make the fewest tokens, but large ones fill packs badly and do not balance ranks. So the groups are
    packed whole, then cut into bundles of at most 1/2, 1/4 and 1/8 of a pack, then one by one, as long as that can
    pay; the packs with the least cost stay. The cost is the tokens of all ranks if each took as long as the dearest,
    with `equal_parts` ranks, or one for each pack where there are fewer packs. One by one has the packs of a plan
    without sharing, and no way has more tokens than that plan.

    Args:
        tokens: int [n], prompt and response of the sequences, groups one after another.
        prompts: int [n], of it the prompt; equal within a group.
        sizes: int [g], members of each group, all above 0.
        equal_parts: as in `pack`.
        names: store indices of the sequences, for the error message.

    Raises:
        ConfigError: a sequence is longer than `max_tokens`.
    """
    require_fit(tokens, max_tokens, names)
    if len(sizes) == 0:
        return []
    group = np.repeat(np.arange(len(sizes)), sizes)
    best: list[list[int]] = []
    least = np.inf
    for limit in (*(max_tokens // parts for parts in PARTS_OF_A_PACK), 0):
        bundles = _bundles(tokens, prompts, sizes, limit, max_tokens)
        lengths = np.array([tokens[bundle].sum() - (len(bundle) - 1) * prompts[bundle[0]] for bundle in bundles])
        # Smaller bundles have more prompts between them.
        if lengths.sum() >= least:
            break
        packs = [
            sorted(member for bundle in packed for member in bundles[bundle])
            for packed in pack(lengths, max_tokens, equal_parts=equal_parts)
        ]
        cost = _cost(packs, tokens, prompts, group, equal_parts)
        if cost < least:
            best, least = packs, cost
    return sorted(best)


def _bundles(tokens: IntArray, prompts: IntArray, sizes: IntArray, limit: int, max_tokens: int) -> list[list[int]]:
    """Each group whole where it has at most `limit` tokens, else dealt evenly into as many bundles as that takes."""
    bundles = []
    starts = np.cumsum(sizes) - sizes
    whole = prompts[starts] + np.add.reduceat(tokens - prompts, starts) <= limit
    for start, size, fits in zip(starts.tolist(), sizes.tolist(), whole.tolist(), strict=True):
        if fits:
            bundles.append(list(range(start, start + size)))
            continue
        prompt = int(prompts[start])
        responses = (tokens[start : start + size] - prompt).tolist()
        order = sorted(range(size), key=lambda item: -responses[item])
        count = min(size, -(-sum(responses) // max(limit - prompt, 1))) or 1
        # Every sequence fits into a pack, so one bundle each always does.
        while (dealt := evenly(order, responses, max_tokens - prompt, count)) is None:
            count += 1
        bundles += [[start + item for item in bundle] for bundle in dealt]
    return bundles


def _cost(packs: list[list[int]], tokens: IntArray, prompts: IntArray, group: IntArray, equal_parts: int) -> float:
    order = np.array([member for members in packs for member in members])
    number = np.repeat(np.arange(len(packs)), [len(members) for members in packs])
    loads = np.bincount(number, weights=added_tokens(tokens[order], prompts[order], group[order], number))
    return float(loads.sum()) * (1 + imbalance(loads, assign(loads, min(equal_parts, len(packs)))))
