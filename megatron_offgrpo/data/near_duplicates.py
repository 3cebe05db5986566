"""Near-duplicate problems: MinHash signatures by datasketch, banded, then checked by the exact Jaccard similarity."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from datasketch import MinHash

from megatron_offgrpo.data.text_measures import shingles
from megatron_offgrpo.types import BoolArray, IntArray

NUM_PERMUTATIONS = 128
SIGNATURE_SEED = 1
RECALL = 0.999
MAX_HEADS = 32
"""In one bucket a problem is compared with at most so many that are unlike each other."""


def signatures(problems: Sequence[str]) -> npt.NDArray[np.uint32]:
    """uint32 [num_problems, 128]: MinHash of each problem's word 3-grams."""
    found = MinHash.generator(
        ([one.encode() for one in shingles(problem)] for problem in problems),
        num_perm=NUM_PERMUTATIONS,
        seed=SIGNATURE_SEED,
        hashfunc=zlib.crc32,  # 32 bits are what the signature keeps; SHA-1 takes most of the time
    )
    rows = [one.hashvalues.astype(np.uint32) for one in found]
    return np.array(rows, dtype=np.uint32).reshape(len(rows), NUM_PERMUTATIONS)


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """(b, r): the most rows a band may have so that pairs at the threshold meet in a band with probability 0.999.

    P = 1 - (1 - t^r)^b with b = 128 // r (Leskovec et al., Mining of Massive Datasets, section 3.4).
    """
    for rows in range(16, 1, -1):
        bands = NUM_PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= RECALL:
            return bands, rows
    return NUM_PERMUTATIONS, 1


def linked_heads(
    signatures_N: Any, usable_N: BoolArray, threshold: float, similar: Callable[[int, int], bool]
) -> IntArray:
    """Links problems that share a band and are similar.

    Args:
        signatures_N: uint32 [N, 128], may be memory-mapped; one band is read at a time.
        usable_N: bool [N]; the others take no part.
        similar: whether two problems are as similar as asked for; called for candidates only.

    Returns:
        int64 [N]; the first problem of each one's cluster, itself where alone. Memory: 40 bytes a problem.
    """
    bands, rows = bands_and_rows(threshold)
    head = np.arange(len(usable_N), dtype=np.int64)
    places = np.flatnonzero(usable_N)
    for band in range(bands):
        keys = _band_keys(signatures_N, places, band * rows, rows)
        for bucket in _buckets(keys, places):
            _link(bucket, head, similar)
    for place in places:
        head[place] = _root(head, int(place))
    return head


def _band_keys(signatures_N: Any, places: IntArray, start: int, rows: int) -> npt.NDArray[np.uint64]:
    """A 64-bit key of each problem's band (FNV-like mixing; a collision costs a comparison, not an error)."""
    keys = np.full(len(places), 0xCBF29CE484222325, dtype=np.uint64)
    for first in range(0, len(places), 1 << 16):
        block = slice(first, first + (1 << 16))
        values = np.asarray(signatures_N[places[block], start : start + rows], dtype=np.uint64)
        for column in range(rows):
            keys[block] = (keys[block] ^ values[:, column]) * np.uint64(0x100000001B3)
            keys[block] ^= keys[block] >> np.uint64(29)
    return keys


def _buckets(keys: npt.NDArray[np.uint64], places: IntArray) -> Iterator[list[int]]:
    """Places with equal keys, ascending, where there are two or more."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    bounds = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    sizes = np.diff(bounds)
    for index in np.flatnonzero(sizes > 1):
        yield places[order[bounds[index] : bounds[index + 1]]].tolist()


def _link(bucket: list[int], head: IntArray, similar: Callable[[int, int], bool]) -> None:
    unlike: list[int] = []
    for place in bucket:
        for other in unlike:
            one, two = _root(head, other), _root(head, place)
            if one == two:
                break
            if similar(other, place):
                head[max(one, two)] = min(one, two)
                break
        else:
            if len(unlike) < MAX_HEADS:
                unlike.append(place)


def _root(head: IntArray, place: int) -> int:
    while head[place] != place:
        head[place] = head[head[place]]
        place = int(head[place])
    return place
