"""Groups set apart for validation are in no step, and still in the reference."""

import dataclasses

import numpy as np

from megatron_offgrpo.config import PlanConfig
from megatron_offgrpo.planning.members import epoch_members
from megatron_offgrpo.planning.plan import build_plan
from tests.unit.planning.fakes import OBJECTIVE, fake_store

CONFIG = PlanConfig(
    groups_per_step=1, trajectories_per_group=2, short_groups="cycle", max_pack_tokens=64, pack_multiple=8
)


def test_a_validation_group_is_never_trained_on():
    """Groups of 3, 2 and 1 trajectories (0-2, 3-4, 5); the second is set apart, the third is cycled to two."""
    store = fake_store([3, 2, 1], [1, 1, 1], [2, 3, 4, 5, 6, 7], [1, 0, 1, 0, 1, 1], validation=[1])
    members = epoch_members(store, CONFIG)
    assert members.trajectory.tolist() == [0, 1, 5, 5]
    assert members.offsets.tolist() == [0, 2, 2, 4]
    assert members.group.tolist() == [0, 0, 2, 2]
    assert members.tokens.tolist() == [3, 4, 8, 8]
    plan = build_plan(store, dataclasses.replace(CONFIG, epochs=3), OBJECTIVE)
    assert plan.num_steps == 6
    assert set(plan.trajectory.tolist()) == {0, 1, 5}
    # Of the four trajectories left for training, one is cut; the two of the validation group are not counted as cut.
    assert plan.manifest.counts["trajectories_cut"] == 1
    assert plan.manifest.counts["validation_groups"] == 1
    assert np.isfinite(plan.weight).all()
