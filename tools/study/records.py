"""Trajectory groups as input records, and what the study makes of them: other rewards, other shares, no log-probs."""

import random
from typing import Any

from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import DataError

SHARE_GROUPS = 96
"""Groups of each store of the ablation over all-positive shares."""
Record = dict[str, Any]
Rewards = list[list[float]]
"""By group."""


def as_records(store: TrajectoryStore) -> list[Record]:
    """The groups of a labelled store as input records with given rewards, members in the store's order."""
    records = []
    for number in range(store.num_groups):
        row = store.row(number)
        members = zip(row.texts, row.rewards, row.behaviour_logprobs, strict=True)
        records.append(
            {
                "group_id": row.group_id,
                "problem": row.problem,
                "answer": row.answer,
                "trajectories": [
                    {"text": text, "reward": reward, "logprobs": logprobs, "source": "teacher"}
                    for text, reward, logprobs in members
                ],
            }
        )
    return records


def without_logprobs(records: list[Record]) -> list[Record]:
    """The same trajectories from an unknown policy: mu = 0, as in the released code."""
    return [
        {**group, "trajectories": [{**one, "logprobs": None} for one in group["trajectories"]]} for group in records
    ]


def with_logprobs(records: list[Record]) -> list[Record]:
    """Without the few trajectories whose text does not give the sampled tokens back (an end sign in the middle)."""
    kept = [
        {**group, "trajectories": [one for one in group["trajectories"] if one["logprobs"] is not None]}
        for group in records
    ]
    return [group for group in kept if group["trajectories"]]


def with_rewards(records: list[Record], rewards: Rewards) -> list[Record]:
    """The same trajectories with other rewards."""
    return [
        {
            **group,
            "trajectories": [{**one, "reward": reward} for one, reward in zip(group["trajectories"], row, strict=True)],
        }
        for group, row in zip(records, rewards, strict=True)
    ]


def rewards_of(records: list[Record]) -> Rewards:
    """Rewards by group."""
    return [[one["reward"] for one in group["trajectories"]] for group in records]


def shuffled(rewards: Rewards, seed: int = 0) -> Rewards:
    """A permutation of all rewards."""
    flat = [reward for row in rewards for reward in row]
    random.Random(f"shuffled:{seed}").shuffle(flat)
    values = iter(flat)
    return [[next(values) for _ in row] for row in rewards]


def wrong_lookup(rewards: Rewards) -> Rewards:
    """The released code's slip: problem p gets the rewards of problem floor(p / 8)."""
    return [list(rewards[number // 8]) for number in range(len(rewards))]


def flipped(rewards: Rewards, share: float, seed: int = 0) -> Rewards:
    """Each label flipped with probability `share`."""
    rng = random.Random(f"noise:{share}:{seed}")
    return [[1.0 - reward if rng.random() < share else reward for reward in row] for row in rewards]


def of_share(records: list[Record], percent: int, count: int) -> list[Record]:
    """The first `count` groups of which `percent` are all-positive, in the order of the records.

    Raises:
        DataError: too few of either kind.
    """
    wanted = {True: round(count * percent / 100)}
    wanted[False] = count - wanted[True]
    kept = []
    for group in records:
        kind = all(one["reward"] == 1 for one in group["trajectories"])
        if wanted[kind]:
            wanted[kind] -= 1
            kept.append(group)
    if any(wanted.values()):
        got = f"{wanted[True]} all-positive and {wanted[False]} other groups are missing"
        raise DataError(
            "too few groups", where=f"{count} groups, {percent} % all-positive", got=got, remedy="raise the pool"
        )
    return kept
