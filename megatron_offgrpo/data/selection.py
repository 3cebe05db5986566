"""Which trajectories of a group are kept, and in which order."""

from collections.abc import Sequence
from itertools import islice, zip_longest
from random import Random

from megatron_offgrpo.data_config import SelectMode


def select(rewards: Sequence[float], num_kept: int, mode: SelectMode, *, seed: int, group_id: str) -> list[int]:
    """Indices of the kept trajectories under one of the rules below.

    The random rule depends on seed and group alone, not on which other groups there are.
    """
    if mode == "released":
        return released_order(rewards, num_kept)
    if mode == "balanced":
        return balanced(rewards, num_kept)
    return sorted(Random(f"{seed}:{group_id}").sample(range(len(rewards)), min(num_kept, len(rewards))))


def released_order(rewards: Sequence[float], num_kept: int) -> list[int]:
    """Indices of the kept trajectories: right, wrong, right, wrong, ..., then what remains; at most `num_kept`.

    Right ones keep their original order among themselves, and so do wrong ones. A group with fewer trajectories stays
    short. Source: the released OpenThinker3-7B recipe.
    """
    right = [index for index, reward in enumerate(rewards) if reward == 1]
    wrong = [index for index, reward in enumerate(rewards) if reward != 1]
    alternating = (index for pair in zip_longest(right, wrong) for index in pair if index is not None)
    return list(islice(alternating, num_kept))


def balanced(rewards: Sequence[float], num_kept: int) -> list[int]:
    """As many right as wrong ones, alternating, at most `num_kept` in all; of a uniform group the first `num_kept`."""
    num_right = sum(reward == 1 for reward in rewards)
    each = min(num_right, len(rewards) - num_right, num_kept // 2)
    return released_order(rewards, 2 * each) if each else list(range(min(num_kept, len(rewards))))
