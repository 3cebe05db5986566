"""Advantages worked out by hand, the all-positive rule, and the shift identity."""

import functools
import math

import numpy as np
import pytest

from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.objective import advantages

OFF = np.zeros(4, dtype=bool)
MODES = [
    advantages.grpo,
    advantages.mean_only,
    advantages.rloo,
    functools.partial(advantages.asymmetric, value=0.3),
    advantages.raw,
    advantages.on_policy_baseline,
]


def array(*values):
    return np.array(values, dtype=np.float64)


def test_grpo_divides_by_the_unbiased_standard_deviation():
    # mean 1/2; squared deviations 4 * 1/4 = 1; unbiased variance 1/3; std 1/sqrt(3).
    expected = 0.5 / (1 / math.sqrt(3) + 1e-6)
    got = advantages.grpo(array(1, 1, 0, 0), OFF)
    np.testing.assert_allclose(got, [expected, expected, -expected, -expected], rtol=1e-14)


def test_grpo_of_equal_rewards_is_zero_and_eps_is_a_field():
    assert (advantages.grpo(array(1, 1, 1, 1), OFF) == 0).all()
    # std of (1, 0) is sqrt(1/2); with eps = 1 the divisor is 1 + sqrt(1/2).
    np.testing.assert_allclose(
        advantages.grpo(array(1, 0), OFF[:2], eps=1.0), array(0.5, -0.5) / (1 + math.sqrt(0.5)), rtol=1e-14
    )


def test_mean_only():
    # mean 1/4
    np.testing.assert_allclose(advantages.mean_only(array(1, 0, 0, 0), OFF), [0.75, -0.25, -0.25, -0.25], rtol=1e-14)


def test_rloo_takes_the_mean_of_the_others():
    # For the right one the others' mean is 0; for a wrong one it is 1/3.
    np.testing.assert_allclose(advantages.rloo(array(1, 0, 0, 0), OFF), [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-14)


def test_asymmetric_subtracts_the_value():
    got = advantages.asymmetric(array(1, 0), OFF[:2], value=-0.1)
    np.testing.assert_allclose(got, [1.1, 0.1], rtol=1e-14)


def test_raw_is_the_reward_and_a_copy():
    rewards = array(1, 0, 1)
    got = advantages.raw(rewards, OFF[:3])
    got[0] = 7
    assert rewards.tolist() == [1, 0, 1]


def test_on_policy_baseline_ignores_the_teacher():
    # On-policy rewards 0, 1, 0: mean 1/3; the teacher's trajectory (reward 1) gets 2/3.
    on_policy = np.array([False, True, True, True])
    got = advantages.on_policy_baseline(array(1, 0, 1, 0), on_policy)
    np.testing.assert_allclose(got, [2 / 3, -1 / 3, 2 / 3, -1 / 3], rtol=1e-14)


def test_on_policy_baseline_refuses_a_group_without_on_policy_members():
    with pytest.raises(ConfigError, match="no on-policy trajectory"):
        advantages.on_policy_baseline(array(1, 0), OFF[:2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.4])
def test_a_single_trajectory_keeps_its_reward_in_every_mode(mode, reward):
    assert mode(array(reward), np.array([False])).tolist() == [reward]


@pytest.mark.parametrize("mode", [advantages.grpo, advantages.mean_only, advantages.rloo])
def test_rewards_shifted_by_one_give_the_same_advantages(mode):
    rewards = array(1, 0, 0, 1)
    np.testing.assert_allclose(mode(rewards - 1, OFF), mode(rewards, OFF), atol=1e-15)


@pytest.mark.parametrize(("rule", "expected"), [("set", [0.1, 0.1]), ("add", [0.3, 0.3]), ("none", [0.2, 0.2])])
def test_all_positive_rule(rule, expected):
    got = advantages.apply_all_positive(array(0.2, 0.2), array(1, 1), rule, 0.1)
    np.testing.assert_allclose(got, expected, rtol=1e-14)


@pytest.mark.parametrize("rewards", [(1, 0), (0, 0), (1, 0.5)])
@pytest.mark.parametrize("rule", ["set", "add", "none"])
def test_all_positive_rule_leaves_other_groups_alone(rule, rewards):
    got = advantages.apply_all_positive(array(0.2, -0.2), array(*rewards), rule, 0.1)
    assert got.tolist() == [0.2, -0.2]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="all_positive"):
        advantages.apply_all_positive(array(0), array(1), "replace", 0.1)


def test_group_advantages_go_group_by_group():
    # Groups (1, 0), (1, 1, 1), (1), (0) and again (1, 0).
    rewards = array(1, 0, 1, 1, 1, 1, 0, 1, 0)
    offsets = np.array([0, 2, 5, 6, 7, 9])
    got = advantages.group_advantages(rewards, offsets, np.zeros(9, bool), advantages.mean_only, "set", 0.1)
    # One-trajectory groups: the right one is all-positive and gets b, the wrong one keeps A = r = 0.
    np.testing.assert_allclose(got, [0.5, -0.5, 0.1, 0.1, 0.1, 0.1, 0, 0.5, -0.5], rtol=1e-14)
    added = advantages.group_advantages(rewards, offsets, np.zeros(9, bool), advantages.mean_only, "add", 0.1)
    np.testing.assert_allclose(added, [0.5, -0.5, 0.1, 0.1, 0.1, 1.1, 0, 0.5, -0.5], rtol=1e-14)


def test_groups_with_equal_rewards_and_other_policies_are_told_apart():
    on_policy = np.array([True, False, False, True])
    got = advantages.group_advantages(
        array(1, 0, 1, 0), np.array([0, 2, 4]), on_policy, advantages.on_policy_baseline, "none", 0.0
    )
    # Baselines 1 (the first of group 0) and 0 (the second of group 1).
    assert got.tolist() == [0, -1, 1, 0]


def test_signed_looks_at_one_trajectory_alone():
    for rewards in ([1.0, 0.0, 0.0], [1.0], [0.0], [1.0, 1.0]):
        array = np.array(rewards)
        assert advantages.signed(array, array > 2).tolist() == [1.0 if reward else -1.0 for reward in rewards]
