"""What the plan reads of a store, and the trajectories of one epoch with everything the plan needs of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import ObjectiveConfig, PlanConfig, WeightMode
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.objective.advantages import group_advantages
from megatron_offgrpo.objective.needs import needs_of
from megatron_offgrpo.objective.weights import trajectory_weights
from megatron_offgrpo.planning.schedule import select_members
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray


class Groups(Protocol):
    """Trajectory groups without their tokens; see `megatron_offgrpo.data.store.TrajectoryStore`."""

    @property
    def manifest(self) -> Manifest: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def num_trajectories(self) -> int: ...
    @property
    def group_offsets(self) -> IntArray: ...
    @property
    def prompt_lengths(self) -> IntArray: ...
    @property
    def response_lengths(self) -> IntArray: ...
    @property
    def rewards(self) -> FloatArray: ...
    @property
    def on_policy(self) -> BoolArray: ...
    @property
    def has_behaviour_logprobs(self) -> BoolArray: ...
    @property
    def truncated(self) -> BoolArray: ...
    @property
    def validation_groups(self) -> BoolArray: ...


@dataclass(frozen=True)
class Members:
    """The M trajectories of one epoch in store order, after cutting and cycling; groups lie one after another."""

    trajectory: IntArray
    """[M] store index; a cycled trajectory stands there several times."""
    group: IntArray
    """[M]"""
    offsets: IntArray
    """[G + 1] where each group begins."""
    tokens: IntArray
    """[M] prompt and response tokens."""
    response_tokens: IntArray
    """[M]"""

    @property
    def prompt_tokens(self) -> IntArray:
        """[M]"""
        return self.tokens - self.response_tokens

    @property
    def groups(self) -> IntArray:
        """The groups that have a member."""
        return np.flatnonzero(np.diff(self.offsets) > 0)


@dataclass(frozen=True)
class Signals:
    """What the objective makes of the members."""

    reward: FloatArray
    advantage: FloatArray
    """Over the members of a group as they stand in the step, repeats included."""
    masked: BoolArray
    """Truncated, where the objective masks those."""


def epoch_members(
    store: Groups, plan: PlanConfig, *, validation: bool = False, quarantine: Sequence[int] = ()
) -> Members:
    """The trajectories of one epoch; of the groups set apart for validation none, or with `validation` only those.

    Args:
        quarantine: store indices that are left out before a group is cut to its first K or cycled, so that the next
            trajectory of the group takes the place. A group of which nothing is left has no members.
    """
    kept = np.ones(store.num_trajectories, dtype=np.bool_)
    kept[list(quarantine)] = False
    kept_offsets = np.concatenate([[0], np.cumsum(kept)])[store.group_offsets]
    places, offsets = select_members(kept_offsets, plan.trajectories_per_group, plan.short_groups)
    trajectory = np.flatnonzero(kept)[places]
    sizes = np.diff(offsets)
    chosen = store.validation_groups if validation else ~store.validation_groups
    trajectory = trajectory[np.repeat(chosen, sizes)]
    offsets = np.concatenate([[0], np.cumsum(np.where(chosen, sizes, 0))])
    responses = np.asarray(store.response_lengths, dtype=np.int64)[trajectory]
    return Members(
        trajectory=trajectory,
        group=np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)),
        offsets=offsets,
        tokens=np.asarray(store.prompt_lengths, dtype=np.int64)[trajectory] + responses,
        response_tokens=responses,
    )


def require_behaviour_logprobs(store: Groups, members: Members, objective: ObjectiveConfig) -> None:
    """Refuses trajectories without behaviour log-probs where the surrogate compares with the behaviour policy.

    Raises:
        ConfigError: counting them.
    """
    rule = needs_of(objective.surrogate).behaviour
    if rule not in ("required", "on_policy"):
        return
    wanted = members.trajectory if rule == "required" else members.trajectory[store.on_policy[members.trajectory]]
    missing = np.unique(wanted[~store.has_behaviour_logprobs[wanted]])
    if len(missing):
        raise ConfigError(
            f"this surrogate compares with the policy that wrote the trajectories, and {len(missing)} of "
            f"{len(np.unique(wanted))} have no log-probs of it; the first is trajectory {missing[0]}",
            where=f"objective.surrogate = {to_dict(objective)['surrogate']}",
            expected="behaviour log-probs" + ("" if rule == "required" else " of on-policy trajectories"),
            remedy="generate the trajectories with `offgrpo generate`, which keeps them, or take another surrogate",
        )


def member_signals(store: Groups, members: Members, objective: ObjectiveConfig) -> Signals:
    """Rewards, advantages and masks of the members."""
    rewards = np.asarray(store.rewards, dtype=np.float64)[members.trajectory]
    return Signals(
        reward=rewards,
        advantage=group_advantages(
            rewards,
            members.offsets,
            store.on_policy[members.trajectory],
            objective.advantage,
            objective.all_positive,
            objective.all_positive_bias,
        ),
        masked=store.truncated[members.trajectory] & objective.mask_truncated,
    )


def step_weights(
    mode: WeightMode, objective: ObjectiveConfig, members: Members, signals: Signals, places: IntArray
) -> FloatArray:
    """The weight of each response token of the members at `places`, which form one step."""
    return trajectory_weights(
        mode,
        members.response_tokens[places],
        members.group[places],
        max_response_tokens=objective.max_response_tokens,
        mask_N=signals.masked[places],
    )
