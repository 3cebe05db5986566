"""Shared prompts in the plan: when they are chosen, what they save, and that nothing is lost or too long."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_offgrpo.config import PlanConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.objective.trajectory_surrogates import dpo
from megatron_offgrpo.planning.assignment import assign, imbalance
from megatron_offgrpo.planning.estimate import packs_lower_bound
from megatron_offgrpo.planning.flops import pack_flops
from megatron_offgrpo.planning.plan import build_plan, reference_order
from megatron_offgrpo.planning.shape import ModelShape
from megatron_offgrpo.planning.sharing import pack_sharing
from tests.unit.planning.fakes import OBJECTIVE, fake_store, random_store

CONFIG = PlanConfig(
    groups_per_step=4,
    trajectories_per_group=None,
    max_pack_tokens=100,
    pack_multiple=8,
    share_prompts="always",
    shuffle=False,
)
DPO = dataclasses.replace(OBJECTIVE, surrogate=dpo, weight="group")
TINY = ModelShape(2, 4, 6, 2, 1, 2, 10)


def with_(**fields):
    return dataclasses.replace(CONFIG, **fields)


def test_a_small_plan_by_hand():
    """Prompt 6 with responses 3, 4, 0; prompt 2 with responses 1, 5."""
    store = fake_store([3, 2], [6, 2], [3, 4, 0, 1, 5], [1, 0, 1, 0, 1])
    plan = build_plan(store, with_(max_pack_tokens=16), OBJECTIVE)
    # Whole groups have 6 + 7 = 13 and 2 + 6 = 8 tokens, a pack each; two ranks then cost 2 * 13 = 26. With the first in
    # bundles of 6 + 4 and 6 + 3 there are 27 tokens, which cannot be cheaper.
    assert plan.trajectory.tolist() == [0, 1, 2, 3, 4]
    assert plan.pack.tolist() == [0, 0, 0, 1, 1]
    assert plan.tokens.tolist() == [9, 10, 6, 3, 7]
    assert plan.pack_tokens.tolist() == [13, 8]
    assert plan.pack_padded.tolist() == [16, 8]
    assert plan.continues(plan.entries(0)).tolist() == [False, True, True]
    assert plan.continues(plan.entries(1)).tolist() == [False, True]
    assert plan.continues(slice(0, 5)).tolist() == [False, True, True, False, True]
    # The prompt of 6 twice less, that of 2 once less.
    assert plan.manifest.counts["shared_prompt_tokens"] == 14
    assert plan.manifest.counts["tokens"] == 21
    # FLOPs: 6 * 240 a padded token; 6 * 2 layers * query size 4 * (l^2, less p^2 where the prompt is shared); 6 * 40 a
    # response token.
    pairs = [81 + (100 - 36) + (36 - 36), 9 + (49 - 4)]
    expected = [1440 * 16 + 48 * pairs[0] + 240 * 7, 1440 * 8 + 48 * pairs[1] + 240 * 6]
    np.testing.assert_allclose(pack_flops(plan, TINY), expected, rtol=1e-15)
    np.testing.assert_allclose(pack_flops(plan, TINY, packs=range(1, 2)), expected[1:], rtol=1e-15)


def test_a_group_longer_than_a_pack_is_dealt_evenly_into_as_few_as_hold_it():
    # Prompt 10 and eight responses of 15 in packs of 100: 130 tokens; two bundles of 10 + 60.
    packs = pack_sharing(np.full(8, 25), np.full(8, 10), np.array([8]), 100)
    assert [len(members) for members in packs] == [4, 4]
    # Prompt 40: a pack holds four responses.
    packs = pack_sharing(np.full(8, 55), np.full(8, 40), np.array([8]), 100)
    assert [len(members) for members in packs] == [4, 4]
    # And only three with a prompt of 41: two bundles of four would be 101 long.
    packs = pack_sharing(np.full(8, 56), np.full(8, 41), np.array([8]), 100)
    assert sorted(len(members) for members in packs) == [2, 3, 3]


def test_groups_are_cut_where_ranks_would_wait_for_a_whole_one():
    # Prompts of 10; eight responses of 10 in the first group (90 tokens), one in the second (20). Whole, two ranks cost
    # 2 * 90. Cut at half a pack: bundles of 50, 50 and 20 are dealt 70 | 50, cost 140. Smaller bundles have more tokens
    # than that, and one by one they are 180.
    tokens, prompts = np.full(9, 20), np.full(9, 10)
    packs = pack_sharing(tokens, prompts, np.array([8, 1]), 100, equal_parts=2)
    assert cost(packs, tokens, prompts, [8, 1], 2) == 140
    assert sorted(map(len, packs)) == [4, 5]
    # One rank waits for nobody.
    assert pack_sharing(tokens, prompts, np.array([8, 1]), 100, equal_parts=1) == [[*range(8)], [8]]


def test_bundles_of_a_group_that_meet_in_a_pack_need_one_prompt():
    # Prompts of 2; sixteen responses of 6 in the first group, two in the second. Cut at a quarter of a pack: bundles of
    # 26, 20, 20, 20, 20, 14 are dealt 26 + 20 + 14 | 20 + 20 + 20; one prompt a pack and group: 58 | 56, cost 116.
    tokens, prompts = np.full(18, 8), np.full(18, 2)
    packs = pack_sharing(tokens, prompts, np.array([16, 2]), 100, equal_parts=2)
    assert cost(packs, tokens, prompts, [16, 2], 2) == 116
    assert sorted(map(len, packs)) == [9, 9]


def cost(packs, tokens, prompts, sizes, ranks):
    """Of all ranks as if each took as long as the dearest."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    loads = []
    for members in packs:
        prompt_of = {group[m]: prompts[m] for m in members}
        loads.append(sum(prompt_of.values()) + sum(int(tokens[m] - prompts[m]) for m in members))
    return sum(loads) * (1 + imbalance(loads, assign(loads, min(ranks, len(packs)))))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20), st.integers(0, 1000), st.integers(1, 6), st.sampled_from([1, 3, 16]), st.sampled_from([72, 300])
)
def test_every_trajectory_once_in_packs_within_the_limit_and_tokens_counted_once(groups, seed, step, parts, longest):
    store = random_store(groups, seed=seed)
    config = with_(groups_per_step=step, seed=seed, equal_parts=parts, epochs=2, max_pack_tokens=longest)
    plan = build_plan(store, config, OBJECTIVE)
    separate = build_plan(store, dataclasses.replace(config, share_prompts="never"), OBJECTIVE)
    steps_per_epoch = -(-groups // step)
    for epoch in (0, 1):
        members = plan.trajectory[plan.step // steps_per_epoch == epoch]
        assert sorted(members.tolist()) == list(range(store.num_trajectories))
    assert (plan.pack_padded <= longest).all()
    total = 0
    for number in range(plan.num_packs):
        entries = plan.entries(number)
        group, trajectory = plan.group[entries], plan.trajectory[entries]
        # Members of a group side by side, and all but the first of them continue.
        changes = np.flatnonzero(np.diff(group)) + 1
        assert len(changes) + 1 == len(set(group.tolist()))
        starts = {0, *changes.tolist()}
        assert plan.continues(entries).tolist() == (
            [place not in starts for place in range(len(group))]
            if plan.manifest.counts["shared_prompt_tokens"]
            else [False] * len(group)
        )
        prompt_of = dict(zip(group.tolist(), store.prompt_lengths[trajectory].tolist(), strict=True))
        tokens = sum(prompt_of.values()) + store.response_lengths[trajectory].sum()
        assert plan.pack_tokens[number] == tokens
        total += tokens
    assert plan.manifest.counts["tokens"] == total
    assert plan.manifest.counts["tokens"] + plan.manifest.counts["shared_prompt_tokens"] == plan.tokens.sum()
    assert packs_lower_bound(plan) <= plan.num_packs
    for number in range(plan.num_steps):
        loads, apart = (p.pack_tokens[p.packs_of_step(number)] for p in (plan, separate))
        assert loads.sum() <= apart.sum()
        # With more packs than ranks the packs are dealt by a heuristic.
        if max(len(loads), len(apart)) <= parts:
            assert len(loads) * loads.max() <= len(apart) * apart.max()
    # Advantages and weights are those of the plan without sharing.
    one, other = (np.lexsort([p.trajectory, p.step]) for p in (plan, separate))
    for name in ("step", "trajectory", "advantage", "weight", "kl_weight"):
        assert np.array_equal(getattr(plan, name)[one], getattr(separate, name)[other])


@pytest.mark.parametrize(
    ("prompt", "response", "longest", "shares"),
    [
        (1, 9, 96, True),  # one prompt of two saved: 1 of 20 tokens, 5 %
        (1, 10, 96, False),  # 1 of 22
        (48, 48, 96, False),  # a pack has room for one response beside the prompt: nothing to save
        (48, 24, 96, True),  # for two: 48 of 144
    ],
)
def test_auto_shares_where_it_can_save_a_twentieth(prompt, response, longest, shares):
    store = fake_store([2, 2], [prompt] * 2, [response] * 4, [1, 0, 1, 0])
    plan = build_plan(store, with_(share_prompts="auto", max_pack_tokens=longest), OBJECTIVE)
    assert (plan.manifest.counts["shared_prompt_tokens"] > 0) == shares
    assert reference_order(store, with_(share_prompts="auto", max_pack_tokens=longest), OBJECTIVE)[1] == shares


def test_reference_packs_are_those_of_epoch_0_and_share_alike():
    store = random_store(20)
    config = with_(trajectories_per_group=3, shuffle=True)
    plan = build_plan(store, config, OBJECTIVE)
    packs, shares = reference_order(store, config, OBJECTIVE)
    assert shares
    assert packs[: plan.num_packs] == [plan.trajectory[plan.entries(n)].tolist() for n in range(plan.num_packs)]
    assert {member for members in packs for member in members} == set(range(store.num_trajectories))


def test_whole_groups_count_their_prompt_once():
    # 40 + 2 * 28 = 96 tokens, which would be 136 apart.
    store = fake_store([2], [40], [28, 28], [1, 0])
    with pytest.raises(ConfigError, match="136 tokens"):
        build_plan(store, with_(share_prompts="never"), DPO)
    plan = build_plan(store, CONFIG, DPO)
    assert plan.pack_tokens.tolist() == [96]
    assert plan.continues(slice(0, 2)).tolist() == [False, True]


def test_a_trajectory_longer_than_a_pack_is_named():
    store = fake_store([1, 2], [1, 2], [5, 5, 95], [1, 0, 1])
    with pytest.raises(ConfigError, match=r"trajectory 2.*at most 96 tokens.*got 97 tokens.*remedy"):
        build_plan(store, CONFIG, OBJECTIVE)


def test_equal_groups_of_short_answers_reach_the_least_tokens_and_balance():
    # 32 groups: prompts of 512 tokens, eight answers of 64, packs of 8192: 1024 tokens a group.
    tokens, prompts, sizes = np.full(256, 576), np.full(256, 512), np.full(32, 8)
    packs = pack_sharing(tokens, prompts, sizes, 8192, equal_parts=16)
    assert cost(packs, tokens, prompts, sizes, 16) == 32 * 1024
    assert len(packs) == 4


def test_old_plans_share_nothing():
    plan = build_plan(random_store(4), with_(share_prompts="never"), OBJECTIVE)
    counts = {name: value for name, value in plan.manifest.counts.items() if name != "shared_prompt_tokens"}
    old = dataclasses.replace(plan, manifest=dataclasses.replace(plan.manifest, counts=counts))
    assert not old.continues(old.entries(0)).any()
    assert packs_lower_bound(old) == packs_lower_bound(plan)


def test_a_quarantine_does_not_change_the_choice():
    # One prompt token of ten is shared in each group, 5 %: just enough. Without trajectory 1 it would be 1 of 30.
    store = fake_store([2, 2], [1, 1], [9] * 4, [1, 0, 1, 0])
    config = with_(share_prompts="auto")
    assert build_plan(store, config, OBJECTIVE).manifest.counts["shared_prompt_tokens"] == 2
    assert build_plan(store, config, OBJECTIVE, quarantine=[1]).manifest.counts["shared_prompt_tokens"] == 1
