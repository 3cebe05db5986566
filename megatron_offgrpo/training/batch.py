"""Turns a pack of the plan into tensors: token ids for the model, one row per response token for the loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.model.packing import ModelInput, PackedSegments, own_tokens
from megatron_offgrpo.objective.compose import TokenTerms
from megatron_offgrpo.planning.plan import Plan

ReferenceLookup = Callable[[int], npt.NDArray[np.float32]]
"""Trajectory index -> reference log-probs, one per response token."""


@dataclass(frozen=True)
class Member:
    """A trajectory's part in a pack."""

    trajectory: int
    group: int = 0
    advantage: float = 0.0
    reward: float = 0.0
    weight: float = 0.0
    kl_weight: float = 0.0
    continues: bool = False
    """Its prompt is that of the member before it, and stands in the pack once for both."""


@dataclass(frozen=True)
class Batch:
    """One pack on the device; the loss tensors are [R] fp32, one row per response token."""

    pack: int | None
    """Number of the pack in the plan; None for a zero-weight pack."""
    model_input: ModelInput
    mu: Tensor
    ref: Tensor
    on_policy: Tensor
    advantage: Tensor
    reward: Tensor
    weight: Tensor
    kl_weight: Tensor
    trajectory: Tensor
    """[R] int64, the row's place in `members`."""
    member_advantage: Tensor
    """[K] fp32, A of each of `members`."""
    members: tuple[Member, ...]
    row_places: npt.NDArray[np.int64]
    """[R], the row's place among all response tokens of the pack, of which a context-parallel rank has some."""

    def terms(self, logp: Tensor, entropy: Tensor) -> TokenTerms:
        """What the objective needs, with the model's log-probs and entropies [R]."""
        return TokenTerms(
            logp=logp,
            entropy=entropy,
            mu=self.mu,
            ref=self.ref,
            on_policy=self.on_policy,
            advantage=self.advantage,
            reward=self.reward,
            weight=self.weight,
            kl_weight=self.kl_weight,
            trajectory=self.trajectory,
            trajectory_advantage=self.member_advantage,
            group_bounds=_group_bounds([member.group for member in self.members]),
        )


def members_of(plan: Plan, pack: int) -> list[Member]:
    """The trajectories of a pack of the plan, with their advantages and weights."""
    entries = plan.entries(pack)
    return [
        Member(
            trajectory=int(plan.trajectory[i]),
            group=int(plan.group[i]),
            advantage=float(plan.advantage[i]),
            reward=float(plan.reward[i]),
            weight=float(plan.weight[i]),
            kl_weight=float(plan.kl_weight[i]),
            continues=continues,
        )
        for i, continues in enumerate(plan.continues(entries).tolist(), entries.start)
    ]


@dataclass
class _Row:
    """What the members' tokens make of the row, before any sharding."""

    ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])
    """Of the segments: a prompt and its response, or a response that continues an earlier prompt."""
    prompt: tuple[int, int] = (0, 0)
    """Places of the latest prompt."""
    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Segment -> the places of the prompt that it continues."""
    rows: list[npt.NDArray[np.int64]] = field(default_factory=list)
    """Of each response token, the place before it, where it is predicted."""

    def add(self, prompt_ids: npt.NDArray[np.int32], response_ids: npt.NDArray[np.int32], *, continues: bool) -> None:
        start, length = self.bounds[-1], len(response_ids)
        if continues:
            self.prompts[len(self.bounds) - 1] = self.prompt
        else:
            self.prompt = (start, start + len(prompt_ids))
            self.ids.append(prompt_ids)
            start = self.prompt[1]
        self.ids.append(response_ids)
        self.rows.append(np.concatenate([[self.prompt[1] - 1], np.arange(start, start + length - 1)])[:length])
        self.bounds.append(start + length)

    def pad(self, multiple: int) -> None:
        """To a multiple of `multiple` above 0, by a segment of its own."""
        padding = -self.bounds[-1] % multiple or (0 if self.ids else multiple)
        if padding:
            self.ids.append(np.zeros(padding, np.int32))
            self.bounds.append(self.bounds[-1] + padding)

    def positions(self) -> npt.NDArray[np.int64]:
        """A response that continues a prompt begins at the prompt's length."""
        before = [np.diff(self.prompts.get(number, (0, 0))) for number in range(len(self.bounds) - 1)]
        return np.concatenate(
            [np.arange(end - start) + first for (start, end), first in zip(pairwise(self.bounds), before, strict=True)]
        )


def build_batch(
    store: TrajectoryStore,
    members: list[Member],
    *,
    pack: int | None,
    pack_multiple: int,
    reference: ReferenceLookup | None,
    device: torch.device,
    cp: int = 1,
    cp_rank: int = 0,
) -> Batch:
    """Lays the members' prompts and responses end to end and pads the end to `pack_multiple`.

    Token t of a response is predicted at the place before it: the shift is done here once, before any sharding.
    The first tokens of responses that share a prompt are all predicted at its last place.
    Without members the batch is one padding segment and has no rows (a zero-weight pack). Under context parallelism
    the batch holds this rank's tokens and the rows among them.
    """
    row, targets = _Row(), []
    mu, ref, lengths = [], [], []
    for member in members:
        tokens = store.trajectory(member.trajectory)
        response = len(tokens.response_ids)
        row.add(tokens.prompt_ids, tokens.response_ids, continues=member.continues)
        targets.append(tokens.response_ids)
        known = tokens.behaviour_logprobs
        mu.append(np.zeros(response, np.float32) if known is None else known)
        ref.append(np.zeros(response, np.float32) if reference is None else reference(member.trajectory))
        lengths.append(response)
    row.pad(pack_multiple)

    own = own_tokens(row.bounds[-1], cp, cp_rank)
    place_of = np.full(row.bounds[-1], -1)
    place_of[own] = np.arange(len(own))
    all_rows = place_of[_joined(row.rows)]
    row_places = np.flatnonzero(all_rows >= 0)

    def of_rows(values: npt.NDArray, dtype: torch.dtype = torch.float32) -> Tensor:
        return _tensor(values[row_places], dtype, device)

    def of_members(values: list[float]) -> Tensor:
        return of_rows(np.repeat(np.asarray(values, np.float64), lengths))

    indices = np.asarray([member.trajectory for member in members], dtype=np.int64)
    model_input = ModelInput(
        ids_1T=_tensor(np.concatenate(row.ids)[own], torch.int64, device)[None],
        positions_T=_tensor(row.positions()[own], torch.int64, device),
        segments=PackedSegments.of(tuple(row.bounds), device, prompts=row.prompts, cp=cp, cp_rank=cp_rank),
        rows_R=of_rows(all_rows, torch.int64),
        targets_R=of_rows(_joined(targets), torch.int64),
    )
    return Batch(
        pack=pack,
        model_input=model_input,
        mu=of_rows(_joined(mu)),
        ref=of_rows(_joined(ref)),
        on_policy=of_rows(np.repeat(store.on_policy[indices], lengths), torch.bool),
        advantage=of_members([m.advantage for m in members]),
        reward=of_members([m.reward for m in members]),
        weight=of_members([m.weight for m in members]),
        kl_weight=of_members([m.kl_weight for m in members]),
        trajectory=of_rows(np.repeat(np.arange(len(members)), lengths), torch.int64),
        member_advantage=_tensor(np.asarray([m.advantage for m in members]), torch.float32, device),
        members=tuple(members),
        row_places=row_places,
    )


def _group_bounds(groups: list[int]) -> tuple[int, ...]:
    """(0, ..., K) where the group changes; the plan lays a group's members side by side."""
    changes = [place for place in range(1, len(groups)) if groups[place] != groups[place - 1]]
    return (0, *changes, len(groups)) if groups else (0,)


def _joined(parts: list[npt.NDArray]) -> npt.NDArray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _tensor(values: npt.NDArray, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype).to(device, non_blocking=True)
