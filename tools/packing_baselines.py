"""Packings of other trainers, written from their definitions, to compare with: none is used in training."""

import heapq
from bisect import bisect_right

import numpy as np

from megatron_offgrpo.types import IntArray


def first_fit_decreasing(lengths: IntArray, max_tokens: int) -> list[list[int]]:
    """Longest first, each to the first pack with room (Johnson 1973)."""
    packs: list[list[int]] = []
    room = np.zeros(len(lengths), dtype=np.int64)
    for item in np.argsort(-lengths, kind="stable").tolist():
        fitting = np.flatnonzero(room[: len(packs)] >= lengths[item])
        if len(fitting) == 0:
            room[len(packs)] = max_tokens
            packs.append([])
            fitting = np.array([len(packs) - 1])
        packs[fitting[0]].append(item)
        room[fitting[0]] -= lengths[item]
    return packs


def karmarkar_karp(lengths: IntArray, max_tokens: int) -> list[list[int]]:
    """verl's dynamic batches: the fewest packs by tokens, filled by the largest differencing method.

    verl takes ceil(tokens / max_tokens) parts and does not look whether each stays within the limit; here the number
    of parts grows until each does.
    """
    num_parts = max(1, -(-int(lengths.sum()) // max_tokens))
    while True:
        parts = largest_differencing(lengths, num_parts)
        if max(lengths[part].sum() for part in parts) <= max_tokens:
            return [part for part in parts if part]
        num_parts += 1


def largest_differencing(lengths: IntArray, num_parts: int) -> list[list[int]]:
    """Karmarkar & Karp (1982): the two partial solutions that differ most inside are merged, large sums onto small."""
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for item, length in enumerate(lengths.tolist()):
        heap.append((-length, item, [(length, [item])] + [(0, []) for _ in range(num_parts - 1)]))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, number, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
    return [part for _, part in heap[0][2]]


def modified_first_fit_decreasing(lengths: IntArray, max_tokens: int) -> list[list[int]]:
    """NeMo-RL's packer, the MFFD of Johnson & Garey (1985), at most 71/60 of the fewest packs.

    Sequences over C/2 open a pack each, longest first. Forward: each pack takes the longest of (C/3, C/2] that fits.
    Backward: packs without one of those take the shortest of (C/6, C/3] and the longest other of these that fits
    beside it. Forward again: each pack takes the longest left that fits, until none does. The rest goes by first fit
    decreasing into new packs.
    """
    ascending = sorted((length, item) for item, length in enumerate(lengths.tolist()))
    large = [pair for pair in reversed(ascending) if 2 * pair[0] > max_tokens]
    medium = [pair for pair in ascending if 3 * pair[0] > max_tokens >= 2 * pair[0]]
    small = [pair for pair in ascending if 6 * pair[0] > max_tokens >= 3 * pair[0]]
    tiny = [pair for pair in ascending if 6 * pair[0] <= max_tokens]
    packs = [[item] for _, item in large]
    room = [max_tokens - length for length, _ in large]

    def put(number: int, pair: tuple[int, int]) -> None:
        packs[number].append(pair[1])
        room[number] -= pair[0]

    for number in range(len(packs)):
        fitting = _longest_within(medium, room[number])
        if fitting is not None:
            put(number, medium.pop(fitting))
    for number in reversed(range(len(packs))):
        if len(packs[number]) > 1 or len(small) < 2 or small[0][0] + small[1][0] > room[number]:
            continue
        put(number, small.pop(0))
        fitting = _longest_within(small, room[number])
        if fitting is not None:
            put(number, small.pop(fitting))
    left = sorted([*medium, *small, *tiny])
    for number in range(len(packs)):
        while (fitting := _longest_within(left, room[number])) is not None:
            put(number, left.pop(fitting))
    rest = np.array([item for _, item in reversed(left)], dtype=np.int64)
    return packs + [[int(rest[item]) for item in part] for part in first_fit_decreasing(lengths[rest], max_tokens)]


def _longest_within(ascending: list[tuple[int, int]], room: int) -> int | None:
    """The place of the longest sequence that fits."""
    place = bisect_right(ascending, (room, 1 << 62))
    return place - 1 if place else None
