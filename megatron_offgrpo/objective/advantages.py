"""Group-relative advantages: (rewards_G, on_policy_G) -> A_G in float64, one group at a time; NumPy only.

A group with one trajectory has no other to compare with and gets A = r, in every mode but `signed`, which never does.
"""

import itertools
from collections.abc import Callable

import numpy as np

from megatron_offgrpo.config import AllPositiveRule
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray

Advantage = Callable[[FloatArray, BoolArray], FloatArray]


def grpo(rewards_G: FloatArray, on_policy_G: BoolArray, *, eps: float = 1e-6) -> FloatArray:
    """A = (r - mean(r)) / (std(r) + eps), with the unbiased standard deviation (Shao et al. 2024, section 4.1.2)."""
    if len(rewards_G) == 1:
        return rewards_G.copy()
    return (rewards_G - rewards_G.mean()) / (rewards_G.std(ddof=1) + eps)


def mean_only(rewards_G: FloatArray, on_policy_G: BoolArray) -> FloatArray:
    """A = r - mean(r), without division by the standard deviation (Dr. GRPO: Liu et al. 2025, section 3.2)."""
    if len(rewards_G) == 1:
        return rewards_G.copy()
    return rewards_G - rewards_G.mean()


def rloo(rewards_G: FloatArray, on_policy_G: BoolArray) -> FloatArray:
    """A_i = r_i - mean of the other rewards = (r_i - mean(r)) * G / (G - 1) (Ahmadian et al. 2024)."""
    size = len(rewards_G)
    if size == 1:
        return rewards_G.copy()
    return (rewards_G - rewards_G.mean()) * (size / (size - 1))


def asymmetric(rewards_G: FloatArray, on_policy_G: BoolArray, *, value: float) -> FloatArray:
    """A = r - V with a fixed baseline V (AsymRE: Arnal et al. 2025); V below the mean reward favours positives."""
    if len(rewards_G) == 1:
        return rewards_G.copy()
    return rewards_G - value


def raw(rewards_G: FloatArray, on_policy_G: BoolArray) -> FloatArray:
    """A = r."""
    return rewards_G.copy()


def signed(rewards_G: FloatArray, on_policy_G: BoolArray) -> FloatArray:
    """A = 2 r - 1: 1 for a right trajectory, -1 for a wrong one, whatever the others of the group are."""
    return 2.0 * rewards_G - 1.0


def on_policy_baseline(rewards_G: FloatArray, on_policy_G: BoolArray) -> FloatArray:
    """A = r - mean of the rewards of the group's on-policy members.

    Raises:
        ConfigError: a group of several trajectories has no on-policy member.
    """
    if len(rewards_G) == 1:
        return rewards_G.copy()
    if not on_policy_G.any():
        raise ConfigError(
            "a group has no on-policy trajectory to take the baseline from",
            where="objective.advantage = on_policy_baseline",
            expected="at least one trajectory with on_policy in each group of two or more",
            got=f"{len(rewards_G)} off-policy trajectories",
            remedy="add the student's own rollouts to the store, or use mean_only",
        )
    return rewards_G - rewards_G[on_policy_G].mean()


def apply_all_positive(
    advantages_G: FloatArray, rewards_G: FloatArray, rule: AllPositiveRule, bias: float
) -> FloatArray:
    """The all-positive rule: where every reward of the group is 1, `set` gives A = b, `add` A + b, `none` A."""
    if rule == "none" or not (rewards_G == 1).all():
        return advantages_G
    if rule == "set":
        return np.full_like(advantages_G, bias)
    if rule == "add":
        return advantages_G + bias
    raise ConfigError("unknown rule", where="objective.all_positive", expected="set, add or none", got=rule)


def group_advantages(
    rewards_N: FloatArray,
    offsets_G1: IntArray,
    on_policy_N: BoolArray,
    advantage: Advantage,
    rule: AllPositiveRule,
    bias: float,
) -> FloatArray:
    """Advantages of all trajectories, group by group.

    Args:
        rewards_N: float64 [N], groups one after another.
        offsets_G1: int64 [G + 1]; group g holds the trajectories offsets[g] to offsets[g + 1] - 1.
        on_policy_N: bool [N].
        advantage: one of the functions above, possibly with bound keywords.
        rule, bias: see `apply_all_positive`.

    Returns:
        float64 [N].
    """
    rewards_N = np.ascontiguousarray(rewards_N, dtype=np.float64)
    on_policy_N = np.ascontiguousarray(on_policy_N, dtype=np.bool_)
    result_N = np.empty_like(rewards_N)
    # With 0/1 rewards few groups differ, and advantages are pure functions: each distinct group is computed once.
    known: dict[tuple[bytes, bytes], FloatArray] = {}
    bounds = np.asarray(offsets_G1).tolist()
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        rewards_G, on_policy_G = rewards_N[start:end], on_policy_N[start:end]
        key = (rewards_G.tobytes(), on_policy_G.tobytes())
        if key not in known:
            known[key] = apply_all_positive(advantage(rewards_G, on_policy_G), rewards_G, rule, bias)
        result_N[start:end] = known[key]
    return result_N
