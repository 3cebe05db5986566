"""A plan without the trajectories in quarantine: every group stays in its step."""

import dataclasses

import numpy as np
import pytest

from megatron_offgrpo.config import PlanConfig
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.objective import advantages
from megatron_offgrpo.objective.needs import needs
from megatron_offgrpo.planning.members import epoch_members
from megatron_offgrpo.planning.plan import ARRAYS, build_plan
from tests.unit.planning.fakes import OBJECTIVE, fake_store, random_store

CONFIG = PlanConfig(trajectories_per_group=2, groups_per_step=1, max_pack_tokens=16, pack_multiple=8, shuffle=False)


def store_of_two_groups():
    """g0: trajectories 0, 1, 2 with rewards 1, 0, 0; g1: 3, 4 with 1, 1. Prompts of 1 token, responses of 2 to 6."""
    return fake_store([3, 2], [1, 1], [2, 3, 4, 5, 6], [1, 0, 0, 1, 1])


def test_the_next_trajectory_of_the_group_takes_the_place():
    members = epoch_members(store_of_two_groups(), CONFIG, quarantine=[0])
    assert members.trajectory.tolist() == [1, 2, 3, 4]
    assert members.offsets.tolist() == [0, 2, 4]
    assert members.tokens.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("rule", "expected"), [("keep", [0, 1, 4]), ("cycle", [0, 1, 4, 4])])
def test_a_group_without_another_one_is_short_or_cycled(rule, expected):
    config = dataclasses.replace(CONFIG, short_groups=rule)
    assert epoch_members(store_of_two_groups(), config, quarantine=[3]).trajectory.tolist() == expected


def test_advantages_and_weights_are_those_of_what_is_left():
    """Without 1, g0 is (0: reward 1, 2: reward 0): A = 1/2, -1/2; `token` weights 1/(2 + 4). g1: A = 0, 1/(5 + 6)."""
    plan = build_plan(
        store_of_two_groups(), CONFIG, dataclasses.replace(OBJECTIVE, all_positive="none"), quarantine=[1]
    )
    assert plan.trajectory.tolist() == [0, 2, 3, 4]
    assert plan.step.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(plan.advantage, [0.5, -0.5, 0, 0])
    np.testing.assert_allclose(plan.weight, [1 / 6, 1 / 6, 1 / 11, 1 / 11])


@pytest.mark.parametrize("unit", ["token", "group"])
def test_a_group_of_which_nothing_is_left_contributes_nothing(unit):
    """Both groups in one step: B = 2 without g1; the `group` weights count one group: 1/(2 + 3)."""
    surrogate = needs(unit)(lambda *terms: None)
    objective = dataclasses.replace(OBJECTIVE, weight="group", surrogate=surrogate)
    config = dataclasses.replace(CONFIG, groups_per_step=2)
    plan = build_plan(store_of_two_groups(), config, objective, quarantine=[3, 4])
    assert plan.trajectory.tolist() == [0, 1]
    assert plan.num_trajectories_of_step(0) == 2
    np.testing.assert_allclose(plan.weight, [1 / 5, 1 / 5])


def test_a_step_of_which_nothing_is_left_has_no_pack():
    config = dataclasses.replace(CONFIG, epochs=2)
    plan = build_plan(store_of_two_groups(), config, OBJECTIVE, quarantine=[0, 1, 2])
    assert [len(plan.packs_of_step(step)) for step in range(4)] == [0, 1, 0, 1]
    assert plan.step.tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("rule", ["keep", "cycle"])
def test_it_is_the_plan_of_a_store_that_never_had_them(rule):
    """Group 3 has the trajectories 10 to 13; without 11 in the store, those after it are numbered one lower."""
    lengths, rewards = list(range(5, 21)), [1, 0] * 8
    store = fake_store([3, 4, 3, 4, 2], [3, 4, 5, 6, 7], lengths, rewards)
    bare = fake_store([3, 4, 3, 3, 2], [3, 4, 5, 6, 7], np.delete(lengths, 11), np.delete(rewards, 11))
    config = PlanConfig(
        epochs=3, trajectories_per_group=3, groups_per_step=2, max_pack_tokens=64, pack_multiple=8, short_groups=rule
    )
    got, expected = build_plan(store, config, OBJECTIVE, quarantine=[11]), build_plan(bare, config, OBJECTIVE)
    assert got.trajectory.tolist() == (expected.trajectory + (expected.trajectory >= 11)).tolist()
    for name in ARRAYS.keys() - {"trajectory"}:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)


def test_steps_without_them_are_as_before_and_the_order_of_the_list_is_nothing():
    store = random_store(40)
    config = PlanConfig(epochs=2, groups_per_step=8, max_pack_tokens=128, pack_multiple=8)
    before = build_plan(store, config, OBJECTIVE)
    after = build_plan(store, config, OBJECTIVE, quarantine=[7, 50])
    again = build_plan(store, config, OBJECTIVE, quarantine=[50, 7])
    assert after.manifest.fingerprint == again.manifest.fingerprint != before.manifest.fingerprint
    assert not {7, 50} & set(after.trajectory.tolist())
    touched = {int(step) for step in before.step[np.isin(before.trajectory, [7, 50])]}
    assert 0 < len(touched) < before.num_steps
    for step in range(before.num_steps):
        one, other = before.step == step, after.step == step
        if step not in touched:
            assert before.trajectory[one].tolist() == after.trajectory[other].tolist()
            assert before.weight[one].tolist() == after.weight[other].tolist()
        assert set(after.group[other]) <= set(before.group[one])


def test_a_group_that_has_become_silent_stays():
    """Silent groups are found before: g0 keeps its step, or all steps after it would move."""
    silent = dataclasses.replace(OBJECTIVE, beta=0.0, entropy_coefficient=0.0, all_positive="none")
    store = fake_store([2, 2, 2], [1, 1, 1], [2, 3, 4, 5, 6, 7], [1, 0, 1, 1, 1, 0])
    config = dataclasses.replace(CONFIG, drop_silent_groups=True)
    assert build_plan(store, config, silent).trajectory.tolist() == [0, 1, 4, 5]
    plan = build_plan(store, config, silent, quarantine=[1])
    assert (plan.trajectory.tolist(), plan.step.tolist()) == ([0, 4, 5], [0, 1, 1])


def test_nothing_is_left_at_all_or_not_what_the_advantage_needs():
    with pytest.raises(DataError, match="no group to train on"):
        build_plan(store_of_two_groups(), CONFIG, OBJECTIVE, quarantine=range(5))
    store = store_of_two_groups()
    store.on_policy[[0, 3]] = True
    objective = dataclasses.replace(OBJECTIVE, advantage=advantages.on_policy_baseline)
    build_plan(store, CONFIG, objective)
    with pytest.raises(ConfigError, match="no on-policy trajectory"):
        build_plan(store, CONFIG, objective, quarantine=[0])
