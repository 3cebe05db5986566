"""The plan: every trajectory once an epoch, weights, advantages, packs, files, refusals."""

import dataclasses
import functools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_offgrpo.config import PlanConfig
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.objective import advantages
from megatron_offgrpo.planning import plan_files
from megatron_offgrpo.planning.plan import ARRAYS, build_plan, reference_order
from megatron_offgrpo.planning.plan_files import load_plan, require_settings, save_plan
from tests.evil import Evil
from tests.unit.planning.fakes import OBJECTIVE, fake_store, random_store

CONFIG = PlanConfig(
    groups_per_step=4,
    trajectories_per_group=None,
    max_pack_tokens=100,
    pack_multiple=8,
    share_prompts="never",
    epochs=2,
)


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS)


def test_a_small_plan_by_hand():
    """Two groups in one step: (right, wrong) with prompt 2 and responses 3 and 5; (right, right), prompt 1, 4 and 0."""
    store = fake_store([2, 2], [2, 1], [3, 5, 4, 0], [1, 0, 1, 1])
    config = dataclasses.replace(CONFIG, shuffle=False, epochs=1, max_pack_tokens=9, pack_multiple=4)
    plan = build_plan(store, config, dataclasses.replace(OBJECTIVE, kl_weight="constant"))
    # Packs hold 8 tokens, a multiple of 4. Lengths 5, 7, 5, 1: three packs at least; longest first to the emptiest
    # gives 7 | 5 | 5, then the one of 1 token to the first emptiest: (1) | (0, 3) | (2).
    assert plan.trajectory.tolist() == [0, 3, 1, 2]
    assert plan.pack.tolist() == [0, 0, 1, 2]
    assert plan.step.tolist() == [0, 0, 0, 0]
    assert plan.tokens.tolist() == [5, 1, 7, 5]
    assert plan.response_tokens.tolist() == [3, 0, 5, 4]
    assert plan.reward.tolist() == [1, 1, 0, 1]
    # Mean-only advantages; the all-positive group is set to 0.1.
    np.testing.assert_allclose(plan.advantage, [0.5, 0.1, -0.5, 0.1], rtol=1e-15)
    # 12 response tokens in the step; constant: 1 / (4 * 100).
    np.testing.assert_allclose(plan.weight, [1 / 12, 0, 1 / 12, 1 / 12], rtol=1e-15)
    np.testing.assert_allclose(plan.kl_weight, [1 / 400, 0, 1 / 400, 1 / 400], rtol=1e-15)
    assert plan.pack_step.tolist() == [0, 0, 0]
    assert plan.pack_tokens.tolist() == [6, 7, 5]
    assert plan.pack_padded.tolist() == [8, 8, 8]
    assert (plan.num_steps, plan.num_packs, plan.num_trajectories_of_step(0)) == (1, 3, 4)
    assert plan.entries(0) == slice(0, 2)
    assert plan.packs_of_step(0) == range(3)
    assert plan.manifest.inputs == {"store": "store-fingerprint"}
    assert plan.manifest.counts["trajectories_empty"] == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(0, 1000), st.integers(1, 5), st.sampled_from(["token", "group", "sequence"]))
def test_every_trajectory_once_an_epoch_and_weights_as_the_mode_says(num_groups, seed, groups_per_step, mode):
    store = random_store(num_groups, seed=seed)
    config = dataclasses.replace(CONFIG, groups_per_step=groups_per_step, seed=seed)
    plan = build_plan(store, config, dataclasses.replace(OBJECTIVE, weight=mode))
    steps_per_epoch = -(-num_groups // groups_per_step)
    assert plan.num_steps == 2 * steps_per_epoch
    for epoch in (0, 1):
        members = plan.trajectory[plan.step // steps_per_epoch == epoch]
        assert sorted(members.tolist()) == list(range(store.num_trajectories))
    assert (plan.pack_padded <= 100).all()
    assert (plan.pack_padded % 8 == 0).all()
    assert (plan.pack_tokens <= plan.pack_padded).all()
    lengths = store.prompt_lengths + store.response_lengths
    group_of = np.repeat(np.arange(num_groups), np.diff(store.group_offsets))
    for step in range(plan.num_steps):
        rows = plan.step == step
        total = (plan.weight * plan.response_tokens)[rows].sum()
        groups = np.unique(group_of[plan.trajectory[rows]])
        with_tokens = np.unique(group_of[plan.trajectory[rows & (plan.response_tokens > 0)]])
        expected = {
            "token": float(plan.response_tokens[rows].any()),
            "group": len(with_tokens) / len(groups),
            "sequence": (plan.response_tokens[rows] > 0).mean(),
        }[mode]
        assert total == pytest.approx(expected, rel=1e-12)
        assert plan.num_trajectories_of_step(step) == rows.sum()
    for number in range(plan.num_packs):
        entries = plan.entries(number)
        assert (plan.pack[entries] == number).all()
        assert lengths[plan.trajectory[entries]].sum() == plan.pack_tokens[number]
        assert number in plan.packs_of_step(plan.pack_step[number])
        assert (plan.step[entries] == plan.pack_step[number]).all()
    assert (np.diff(plan.pack) >= 0).all()
    assert plan.manifest.counts["tokens"] == 2 * lengths.sum()


def test_weights_and_advantages_do_not_depend_on_the_packing():
    store = random_store(30)

    def by_trajectory(max_pack_tokens):
        plan = build_plan(store, dataclasses.replace(CONFIG, max_pack_tokens=max_pack_tokens), OBJECTIVE)
        order = np.lexsort([plan.trajectory, plan.step])
        return [getattr(plan, name)[order] for name in ("step", "trajectory", "advantage", "weight", "kl_weight")]

    for one, other in zip(by_trajectory(80), by_trajectory(1000), strict=True):
        assert np.array_equal(one, other)


def test_plans_are_repeatable_and_depend_on_the_seed():
    store = random_store(30)
    plan = build_plan(store, CONFIG, OBJECTIVE)
    again = build_plan(random_store(30), CONFIG, OBJECTIVE)
    other = build_plan(store, dataclasses.replace(CONFIG, seed=1), OBJECTIVE)
    assert same(plan, again)
    assert plan.manifest.fingerprint == again.manifest.fingerprint != other.manifest.fingerprint


def test_advantages_are_taken_over_the_members_that_take_part():
    # The first two of (1, 0, 0) have mean 1/2; a single right trajectory cycled to two is all-positive.
    store = fake_store([3, 1], [1, 1], [2, 2, 2, 2], [1, 0, 0, 1])
    config = dataclasses.replace(CONFIG, trajectories_per_group=2, short_groups="cycle", shuffle=False, epochs=1)
    plan = build_plan(store, config, OBJECTIVE)
    assert plan.trajectory.tolist() == [0, 1, 3, 3]
    np.testing.assert_allclose(plan.advantage, [0.5, -0.5, 0.1, 0.1], rtol=1e-15)
    assert plan.num_trajectories_of_step(0) == 4
    assert plan.manifest.counts["trajectories_cut"] == 1
    assert plan.manifest.counts["trajectories_repeated"] == 1


def test_truncated_responses_are_masked_only_where_asked():
    store = fake_store([3], [1], [2, 4, 6], [1, 0, 0], truncated=[1])
    config = dataclasses.replace(CONFIG, epochs=1)
    kept = build_plan(store, config, OBJECTIVE)
    np.testing.assert_allclose(kept.weight, [1 / 12, 1 / 12, 1 / 12], rtol=1e-15)
    masked = build_plan(store, config, dataclasses.replace(OBJECTIVE, mask_truncated=True, kl_weight="sequence"))
    # Eight tokens are left; B stays 3.
    np.testing.assert_allclose(masked.weight, [1 / 8, 0, 1 / 8], rtol=1e-15)
    np.testing.assert_allclose(masked.kl_weight, [1 / 6, 0, 1 / 18], rtol=1e-15)
    assert np.array_equal(masked.advantage, kept.advantage)
    assert masked.manifest.counts["trajectories_masked"] == 1


SILENT = dataclasses.replace(OBJECTIVE, beta=0.0, entropy_coefficient=0.0, all_positive="none")


def test_silent_groups_are_dropped_and_b_says_so():
    store = fake_store([2, 2, 2], [1, 1, 1], [2] * 6, [1, 1, 1, 0, 0, 0])
    config = dataclasses.replace(CONFIG, epochs=1)
    assert build_plan(store, config, SILENT).num_trajectories_of_step(0) == 6
    config = dataclasses.replace(config, drop_silent_groups=True)
    plan = build_plan(store, config, SILENT)
    assert plan.trajectory.tolist() == [2, 3]
    assert plan.num_trajectories_of_step(0) == 2
    assert plan.manifest.counts["silent_groups_dropped"] == 2
    np.testing.assert_allclose(plan.weight, 1 / 4, rtol=1e-15)
    # With a bias the all-positive group speaks.
    biased = build_plan(store, config, dataclasses.replace(SILENT, all_positive="set"))
    assert sorted(biased.trajectory.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("field", ["beta", "entropy_coefficient"])
def test_dropping_silent_groups_is_refused_where_they_have_other_terms(field):
    config = dataclasses.replace(CONFIG, drop_silent_groups=True)
    with pytest.raises(ConfigError, match="drop_silent_groups"):
        build_plan(random_store(3), config, dataclasses.replace(SILENT, **{field: 0.1}))


def test_nothing_left_to_train_on_is_refused():
    store = fake_store([2], [1], [2, 2], [0, 0])
    with pytest.raises(DataError, match="no group"):
        build_plan(store, dataclasses.replace(CONFIG, drop_silent_groups=True), SILENT)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("groups_per_step", 0),
        ("trajectories_per_group", 0),
        ("pack_multiple", 0),
        ("seed", -1),
        ("max_pack_tokens", 7),
        ("short_groups", "fill"),
        ("share_prompts", "sometimes"),
    ],
)
def test_impossible_settings_name_their_field(field, value):
    with pytest.raises(ConfigError, match=f"plan.{field}"):
        build_plan(random_store(3), dataclasses.replace(CONFIG, **{field: value}), OBJECTIVE)


def test_a_trajectory_longer_than_a_pack_is_named():
    store = fake_store([1, 2], [1, 2], [5, 5, 95], [1, 0, 1])
    with pytest.raises(ConfigError, match=r"trajectory 2.*at most 96 tokens.*got 97 tokens.*remedy"):
        build_plan(store, CONFIG, OBJECTIVE)


def test_saved_plans_come_back_to_the_bit(tmp_path):
    objective = dataclasses.replace(OBJECTIVE, advantage=functools.partial(advantages.asymmetric, value=0.2))
    plan = build_plan(random_store(12), CONFIG, objective)
    save_plan(plan, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    assert same(plan, loaded)
    assert all(getattr(loaded, name).dtype == dtype for name, dtype in ARRAYS.items())
    assert loaded.manifest == plan.manifest
    require_settings(loaded, CONFIG, objective, where="here")


def test_a_plan_of_other_settings_is_refused(tmp_path):
    save_plan(build_plan(random_store(12), CONFIG, OBJECTIVE), tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    with pytest.raises(DataError, match=r"runs/plan: .*objective\.all_positive_bias; expected 0\.2; got 0\.1"):
        require_settings(loaded, CONFIG, dataclasses.replace(OBJECTIVE, all_positive_bias=0.2), where="runs/plan")
    with pytest.raises(DataError, match=r"plan\.seed; expected 5; got 0"):
        require_settings(loaded, dataclasses.replace(CONFIG, seed=5), OBJECTIVE, where="runs/plan")
    # The plan does not depend on the surrogate or on beta.
    require_settings(loaded, CONFIG, dataclasses.replace(OBJECTIVE, beta=7.0, surrogate=min), where="runs/plan")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "fingerprint"])
def test_damaged_plans_are_refused(tmp_path, damage):
    save_plan(build_plan(random_store(12), CONFIG, OBJECTIVE), tmp_path / "plan")
    file = tmp_path / "plan" / plan_files.ARRAYS_FILE
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[300] ^= 1
        file.write_bytes(content)
    elif damage == "remove":
        file.unlink()
    else:
        manifest = tmp_path / "plan" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"fingerprint": "0" * 32}))
    with pytest.raises(DataError, match="plan"):
        load_plan(tmp_path / "plan")


@pytest.mark.parametrize("write", [np.savez, lambda file, **arrays: file.write_bytes(pickle.dumps(arrays))])
def test_pickled_objects_in_a_plan_are_refused_and_not_read(tmp_path, write):
    save_plan(build_plan(random_store(12), CONFIG, OBJECTIVE), tmp_path / "plan")
    arrays = {name: np.array([Evil(tmp_path / "ran")], dtype=object) for name in ARRAYS}
    write(tmp_path / "plan" / plan_files.ARRAYS_FILE, **arrays)
    with pytest.raises(DataError, match=r"plan\.npz: unreadable plan .*pickle.*offgrpo plan") as caught:
        load_plan(tmp_path / "plan")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_no_plan_there(tmp_path):
    with pytest.raises(DataError, match="offgrpo plan"):
        load_plan(tmp_path / "plan")


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("rule", ["keep", "cycle"])
def test_reference_order_begins_with_epoch_0_and_covers_the_store(count, rule):
    store = random_store(20)
    config = dataclasses.replace(CONFIG, trajectories_per_group=count, short_groups=rule)
    plan = build_plan(store, config, OBJECTIVE)
    packs, shares = reference_order(store, config, OBJECTIVE)
    assert not shares
    steps_per_epoch = 5
    first = [
        plan.trajectory[plan.entries(number)].tolist()
        for number in range(plan.num_packs)
        if plan.pack_step[number] < steps_per_epoch
    ]
    assert packs[: len(first)] == first
    lengths = store.prompt_lengths + store.response_lengths
    assert all(lengths[members].sum() <= 96 for members in packs)
    assert {member for members in packs for member in members} == set(range(store.num_trajectories))
    rest = [member for members in packs[len(first) :] for member in members]
    assert len(rest) == len(set(rest))
    assert not set(rest) & set(plan.trajectory.tolist())
    assert bool(rest) == (count is not None)
