"""Which trajectories of a group are kept, and in which order."""

from collections.abc import Sequence
from itertools import islice, zip_longest


def released_order(rewards: Sequence[float], num_kept: int) -> list[int]:
    """Indices of the kept trajectories: right, wrong, right, wrong, ..., then what remains; at most `num_kept`.

    Right ones keep their original order among themselves, and so do wrong ones. A group with fewer trajectories stays
    short. Source: the released OpenThinker3-7B recipe.
    """
    right = [index for index, reward in enumerate(rewards) if reward == 1]
    wrong = [index for index, reward in enumerate(rewards) if reward != 1]
    alternating = (index for pair in zip_longest(right, wrong) for index in pair if index is not None)
    return list(islice(alternating, num_kept))
