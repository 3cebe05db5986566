"""Schedule: which trajectories of which groups form which optimizer step."""

from typing import Literal

import numpy as np

from megatron_offgrpo.types import IntArray


def ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """The concatenation of starts[i], starts[i] + 1, ..., starts[i] + counts[i] - 1 over all i."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(starts - (ends - counts), counts)


def select_members(
    group_offsets: IntArray, trajectories_per_group: int | None, short_groups: Literal["keep", "cycle"]
) -> tuple[IntArray, IntArray]:
    """The trajectories of each group that take part: its first K; a shorter group kept, or cycled up to K.

    Args:
        group_offsets: int64 [G + 1]; group g holds trajectories group_offsets[g] to group_offsets[g + 1] - 1.
        trajectories_per_group: K, or None for each group as it is.

    Returns:
        (trajectory, offsets): int64 [M] store indices, group after group, and int64 [G + 1] where each begins.
    """
    sizes = np.diff(group_offsets)
    counts = sizes.copy()
    if trajectories_per_group is not None:
        counts = np.minimum(sizes, trajectories_per_group)
        if short_groups == "cycle":
            counts = np.where(sizes > 0, trajectories_per_group, 0)
    places = ranges(np.zeros_like(counts), counts)
    trajectories = np.repeat(group_offsets[:-1], counts) + places % np.repeat(np.maximum(sizes, 1), counts)
    return trajectories, np.concatenate([[0], np.cumsum(counts)])


def epoch_steps(groups: IntArray, *, seed: int, epoch: int, shuffle: bool, groups_per_step: int) -> list[IntArray]:
    """The groups of each step of one epoch; the last step takes what remains.

    Epoch e is shuffled with the seed sequence (seed, e), so an epoch does not depend on how many there are.
    """
    order = np.random.default_rng([seed, epoch]).permutation(groups) if shuffle else groups
    return [order[start : start + groups_per_step] for start in range(0, len(order), groups_per_step)]
