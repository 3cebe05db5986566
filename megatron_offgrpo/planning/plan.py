"""PLAN: steps, packs and token weights of a whole run; the same for any number of GPUs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_offgrpo.artifacts import Manifest, fingerprint_of
from megatron_offgrpo.config import ObjectiveConfig, PlanConfig
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.objective.needs import needs_of
from megatron_offgrpo.planning.members import (
    Groups,
    Members,
    Signals,
    epoch_members,
    member_signals,
    require_behaviour_logprobs,
    step_weights,
)
from megatron_offgrpo.planning.packing import pack, pack_groups
from megatron_offgrpo.planning.schedule import epoch_steps, ranges
from megatron_offgrpo.planning.settings import capacity, check_settings, check_silent, plan_settings
from megatron_offgrpo.planning.sharing import added_tokens, continuing, pack_sharing, shares_prompts
from megatron_offgrpo.progress import progress
from megatron_offgrpo.types import BoolArray, FloatArray, IntArray

Int32Array = npt.NDArray[np.int32]
ARRAYS = {
    "trajectory": np.int64,
    "group": np.int64,
    "step": np.int32,
    "pack": np.int32,
    "advantage": np.float64,
    "weight": np.float64,
    "kl_weight": np.float64,
    "reward": np.float64,
    "tokens": np.int32,
    "response_tokens": np.int32,
    "pack_step": np.int32,
    "pack_tokens": np.int32,
    "pack_padded": np.int32,
}
"""Arrays of a plan and their types on disk."""


@dataclass(frozen=True)
class Plan:
    """N entries sorted by (step, pack, place in the pack), one per trajectory and epoch, in P packs."""

    manifest: Manifest
    trajectory: IntArray
    """[N] store index."""
    group: IntArray
    """[N] group of the store; members of a group lie side by side in a pack."""
    step: Int32Array
    """[N] optimizer step."""
    pack: Int32Array
    """[N] pack number, ascending over the whole run."""
    advantage: FloatArray
    """[N] A."""
    weight: FloatArray
    """[N] w of each response token."""
    kl_weight: FloatArray
    """[N] v of each response token."""
    reward: FloatArray
    """[N]"""
    tokens: Int32Array
    """[N] prompt and response tokens."""
    response_tokens: Int32Array
    """[N]"""
    pack_step: Int32Array
    """[P] optimizer step of each pack."""
    pack_tokens: Int32Array
    """[P] real tokens; a prompt that members of a group share counts once."""
    pack_padded: Int32Array
    """[P] tokens computed: rounded up to a multiple of plan.pack_multiple."""

    @property
    def num_steps(self) -> int:
        return int(self.pack_step[-1]) + 1

    @property
    def num_packs(self) -> int:
        return len(self.pack_step)

    def entries(self, pack: int) -> slice:
        """The entries of one pack."""
        first, last = np.searchsorted(self.pack, [pack, pack + 1])
        return slice(int(first), int(last))

    def continues(self, entries: slice) -> BoolArray:
        """[n] whether an entry shares the prompt of the entry before it."""
        if not self.manifest.counts.get("shared_prompt_tokens"):
            return np.zeros(entries.stop - entries.start, dtype=np.bool_)
        return continuing(self.group[entries], self.pack[entries])

    def keys_per_token(self) -> float:
        """The most keys that the tokens of a pack see, over those of the longest pack; 1 without shared prompts."""
        keys = np.bincount(self.pack, weights=self.tokens) - self.pack_tokens + self.pack_padded
        return float(keys.max() / self.pack_padded.max())

    def packs_of_step(self, step: int) -> range:
        """The pack numbers of one step."""
        first, last = np.searchsorted(self.pack_step, [step, step + 1])
        return range(int(first), int(last))

    def num_trajectories_of_step(self, step: int) -> int:
        """B of one step, repeats included."""
        first, last = np.searchsorted(self.step, [step, step + 1])
        return int(last - first)


def build_plan(
    store: Groups,
    plan: PlanConfig,
    objective: ObjectiveConfig,
    *,
    validation: bool = False,
    quarantine: Sequence[int] = (),
) -> Plan:
    """Plans the whole run: groups into steps, each step's trajectories into packs, weights over each step.

    Args:
        validation: plan the groups that the store sets apart for validation, instead of the others.
        quarantine: store indices of trajectories to leave out; see `epoch_members`. Every group stays in its step, so
            that steps without such a trajectory are as before. A step of which nothing is left has no pack.

    Raises:
        ConfigError: settings that contradict each other, or a trajectory longer than a pack.
        DataError: no group to train on.
    """
    check_settings(plan)
    members = epoch_members(store, plan, validation=validation)
    signals = member_signals(store, members, objective)
    shares = shares_prompts(plan, members, capacity(plan))
    groups = members.groups
    if plan.drop_silent_groups:
        check_silent(objective)
        groups = np.intersect1d(groups, members.group[signals.advantage != 0])
    if quarantine:
        members = epoch_members(store, plan, validation=validation, quarantine=quarantine)
        signals = member_signals(store, members, objective)
    require_behaviour_logprobs(store, members, objective)
    if not np.isin(groups, members.groups).any():
        raise DataError("no group to train on", where="plan", remedy="look at the counts in the store's manifest")
    parts: list[dict[str, Any]] = []
    num_packs = 0
    with progress("plan", plan.epochs * len(groups)) as advance:
        for epoch in range(plan.epochs):
            for places, packs in _epoch_packs(plan, objective, members, groups, epoch, shares=shares):
                parts.append(_step_arrays(objective, members, signals, places, packs, shares=shares))
                parts[-1]["step"] += len(parts) - 1
                parts[-1]["pack"] += num_packs
                parts[-1]["pack_step"] += len(parts) - 1
                num_packs += len(packs)
                advance(len(np.unique(members.group[places])))
    arrays = {
        name: np.concatenate([part[name] for part in parts]).astype(dtype)
        for name, dtype in ARRAYS.items()
        if name != "pack_padded"
    }
    arrays["pack_padded"] = -(-arrays["pack_tokens"] // plan.pack_multiple) * np.int32(plan.pack_multiple)
    manifest = Manifest(
        kind="plan",
        fingerprint=arrays_fingerprint(arrays),
        inputs={"store": store.manifest.fingerprint},
        counts=_counts(store, members, signals, groups, arrays),
        config=plan_settings(plan, objective),
    )
    return Plan(manifest=manifest, **arrays)


def validation_plan(store: Groups, plan: PlanConfig, objective: ObjectiveConfig) -> Plan:
    """One step over all validation groups, in the store's order.

    Raises:
        ConfigError: the store sets no group apart.
    """
    if not store.validation_groups.any():
        raise ConfigError(
            "the store sets no group apart for validation",
            where="validation.every_steps",
            expected="0",
            remedy="make the store with offgrpo prepare --validation-share 0.05, or set validation.every_steps=0",
        )
    whole = replace(plan, epochs=1, groups_per_step=store.num_groups, shuffle=False, drop_silent_groups=False)
    return build_plan(store, whole, objective, validation=True)


def reference_order(store: Groups, plan: PlanConfig, objective: ObjectiveConfig) -> tuple[list[list[int]], bool]:
    """Packs of store indices that cover every trajectory, and whether members of a group in a pack share their prompt.

    The packs are those of the plan's epoch 0, then packs of the rest.

    The first packs are the plan's own, so that a trajectory's reference is computed in the very pack in which the
    first epoch trains it. Where cycling repeats a trajectory it is computed in each of its packs; the last one
    computed counts. `drop_silent_groups` is not looked at: it excludes the KL term, and then no reference is read.
    """
    check_settings(plan)
    members = epoch_members(store, plan)
    shares = shares_prompts(plan, members, capacity(plan))
    order = [
        members.trajectory[places[positions]].tolist()
        for places, packs in _epoch_packs(plan, objective, members, members.groups, epoch=0, shares=shares)
        for positions in packs
    ]
    rest = np.setdiff1d(np.arange(store.num_trajectories), members.trajectory)
    lengths = np.asarray(store.prompt_lengths, dtype=np.int64)[rest] + np.asarray(store.response_lengths)[rest]
    order += [rest[positions].tolist() for positions in pack(lengths, capacity(plan), names=rest)]
    return order, shares


def _epoch_packs(
    plan: PlanConfig, objective: ObjectiveConfig, members: Members, groups: IntArray, epoch: int, *, shares: bool
) -> Iterator[tuple[IntArray, list[list[int]]]]:
    """Each step of an epoch: places of its members, and its packs as positions in those places."""
    steps = epoch_steps(groups, seed=plan.seed, epoch=epoch, shuffle=plan.shuffle, groups_per_step=plan.groups_per_step)
    for step in steps:
        sizes = members.offsets[step + 1] - members.offsets[step]
        step, sizes = step[sizes > 0], sizes[sizes > 0]
        places = ranges(members.offsets[step], sizes)
        if needs_of(objective.surrogate).unit == "group":
            # All members of a group come into one pack.
            lengths = _added_tokens(members, places, np.zeros_like(places), shares=shares)
            packs = pack_groups(lengths, sizes, capacity(plan), equal_parts=plan.equal_parts, names=step)
        elif shares:
            packs = pack_sharing(
                members.tokens[places],
                members.prompt_tokens[places],
                sizes,
                capacity(plan),
                equal_parts=plan.equal_parts,
                names=members.trajectory[places],
            )
        else:
            names = members.trajectory[places]
            packs = pack(members.tokens[places], capacity(plan), equal_parts=plan.equal_parts, names=names)
        yield places, packs


def _added_tokens(members: Members, places: IntArray, pack: IntArray, *, shares: bool) -> IntArray:
    if not shares:
        return members.tokens[places]
    return added_tokens(members.tokens[places], members.prompt_tokens[places], members.group[places], pack)


def _step_arrays(
    objective: ObjectiveConfig,
    members: Members,
    signals: Signals,
    places: IntArray,
    packs: list[list[int]],
    *,
    shares: bool,
) -> dict[str, Any]:
    """The plan's arrays for one step, steps and packs numbered from 0."""
    order = np.array([position for positions in packs for position in positions], dtype=np.int64)
    sizes = np.array([len(positions) for positions in packs], dtype=np.int64)
    ordered = places[order]
    number = np.repeat(np.arange(len(packs)), sizes)
    added = _added_tokens(members, ordered, number, shares=shares)
    kl_mode = objective.weight if objective.kl_weight is None else objective.kl_weight
    return {
        "trajectory": members.trajectory[ordered],
        "group": members.group[ordered],
        "step": np.zeros(len(order), dtype=np.int64),
        "pack": number,
        "advantage": signals.advantage[ordered],
        "weight": step_weights(objective.weight, objective, members, signals, places)[order],
        "kl_weight": step_weights(kl_mode, objective, members, signals, places)[order],
        "reward": signals.reward[ordered],
        "tokens": members.tokens[ordered],
        "response_tokens": members.response_tokens[ordered],
        "pack_step": np.zeros(len(packs), dtype=np.int64),
        "pack_tokens": np.add.reduceat(added, np.cumsum(sizes) - sizes),
    }


def _counts(
    store: Groups, members: Members, signals: Signals, groups: IntArray, arrays: dict[str, Any]
) -> dict[str, int]:
    distinct = len(np.unique(members.trajectory))
    return {
        "steps": int(arrays["step"][-1]) + 1,
        "packs": len(arrays["pack_step"]),
        "trajectories": len(arrays["trajectory"]),
        "tokens": int(arrays["pack_tokens"].sum(dtype=np.int64)),
        "shared_prompt_tokens": int(arrays["tokens"].sum(dtype=np.int64) - arrays["pack_tokens"].sum(dtype=np.int64)),
        "padded_tokens": int(arrays["pack_padded"].sum(dtype=np.int64)),
        "response_tokens": int(arrays["response_tokens"].sum(dtype=np.int64)),
        "groups_per_epoch": len(groups),
        "silent_groups_dropped": len(members.groups) - len(groups),
        "validation_groups": int(store.validation_groups.sum()),
        "trajectories_cut": int(np.diff(store.group_offsets)[~store.validation_groups].sum()) - distinct,
        "trajectories_repeated": len(members.trajectory) - distinct,
        "trajectories_masked": int(signals.masked.sum()),
        "trajectories_empty": int((members.response_tokens == 0).sum()),
    }


def arrays_fingerprint(arrays: dict[str, Any]) -> str:
    """Of the content alone: equal plans have equal fingerprints wherever they were made."""
    parts: list[Any] = []
    for name, dtype in ARRAYS.items():
        parts += [name, np.ascontiguousarray(arrays[name], dtype=np.dtype(dtype).newbyteorder("<")).tobytes()]
    return fingerprint_of(*parts)
