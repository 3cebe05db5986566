"""What a plan does for an objective on whole groups, and for one that needs the generator's log-probs."""

import dataclasses
import functools

import numpy as np
import pytest

from megatron_offgrpo.config import PlanConfig
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.objective import surrogates
from megatron_offgrpo.objective.trajectory_surrogates import dpo, gspo, topr
from megatron_offgrpo.planning.packing import pack_groups
from megatron_offgrpo.planning.plan import build_plan, reference_order
from megatron_offgrpo.planning.plan_files import require_settings
from tests.unit.planning.fakes import OBJECTIVE, fake_store, random_store

CONFIG = PlanConfig(
    groups_per_step=4,
    trajectories_per_group=None,
    max_pack_tokens=640,
    pack_multiple=8,
    share_prompts="never",
    epochs=2,
)
DPO = dataclasses.replace(OBJECTIVE, surrogate=functools.partial(dpo, temperature=0.2), weight="group")


def test_groups_are_packed_whole():
    # Groups of 5 + 2, 4 and 3 + 3 tokens in packs of 10: 7 | 6 + 4.
    assert pack_groups(np.array([5, 2, 4, 3, 3]), np.array([2, 1, 2]), 10) == [[0, 1], [2, 3, 4]]


def test_a_group_longer_than_a_pack_is_named():
    with pytest.raises(
        ConfigError, match=r"1 groups of a step do not fit into a pack; the longest is group 42; .* got 11 tokens"
    ):
        pack_groups(np.array([5, 4, 7]), np.array([1, 2]), 10, names=np.array([41, 42]))


def test_a_plan_for_groups_keeps_each_in_one_pack_with_its_members_side_by_side():
    store = random_store(40, seed=3)
    plan = build_plan(store, CONFIG, DPO)
    assert plan.num_packs > 1.5 * plan.num_steps, "several packs in most steps"
    for step in range(plan.num_steps):
        entries = np.flatnonzero(plan.step == step)
        for group in np.unique(plan.group[entries]):
            places = entries[plan.group[entries] == group]
            assert len(np.unique(plan.pack[places])) == 1
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            assert len(places) == store.group_offsets[group + 1] - store.group_offsets[group]
    first = [plan.trajectory[plan.entries(pack)].tolist() for pack in plan.packs_of_step(0)]
    assert reference_order(store, CONFIG, DPO)[0][: len(first)] == first


def test_trajectories_are_packed_apart_from_their_groups_otherwise():
    plan = build_plan(random_store(40, seed=3), CONFIG, OBJECTIVE)
    packs = {(step, group): set() for step, group in zip(plan.step.tolist(), plan.group.tolist(), strict=True)}
    for step, group, pack in zip(plan.step.tolist(), plan.group.tolist(), plan.pack.tolist(), strict=True):
        packs[step, group].add(pack)
    assert max(map(len, packs.values())) > 1


def test_a_plan_of_another_unit_is_refused():
    plan = build_plan(random_store(8), CONFIG, dataclasses.replace(OBJECTIVE, weight="group"))
    with pytest.raises(DataError, match=r"objective\.unit"):
        require_settings(plan, CONFIG, DPO, where="plan")


@pytest.mark.parametrize("surrogate", [surrogates.ppo, functools.partial(gspo, epsilon_low=0.1), topr])
def test_missing_behaviour_log_probs_are_refused(surrogate):
    store = fake_store([2, 1], [1, 1], [3, 3, 3], [1, 0, 1])
    objective = dataclasses.replace(OBJECTIVE, surrogate=surrogate)
    store.has_behaviour_logprobs[:] = [True, False, False]
    with pytest.raises(ConfigError, match="2 of 3 have no log-probs of it; the first is trajectory 1"):
        build_plan(store, CONFIG, objective)
    store.has_behaviour_logprobs[:] = True
    assert build_plan(store, CONFIG, objective).num_steps == 2


def test_mixed_needs_those_of_the_students_own_trajectories():
    store = fake_store([2, 1], [1, 1], [3, 3, 3], [1, 0, 1])
    objective = dataclasses.replace(OBJECTIVE, surrogate=surrogates.mixed)
    assert build_plan(store, CONFIG, objective).num_steps == 2
    store.on_policy[1] = True
    with pytest.raises(ConfigError, match="1 of 1 have no log-probs of it; the first is trajectory 1"):
        build_plan(store, CONFIG, objective)
