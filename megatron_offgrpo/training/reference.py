"""The reference pass: one forward over every trajectory of the store, before training and in any layout."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_offgrpo.artifacts import MANIFEST, read_manifest
from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.config_values import to_dict
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.planning.assignment import assign
from megatron_offgrpo.planning.plan import reference_order
from megatron_offgrpo.planning.sharing import continuing
from megatron_offgrpo.progress import progress, say
from megatron_offgrpo.training.batch import Batch, Member, build_batch
from megatron_offgrpo.training.checkpoint import load_weights
from megatron_offgrpo.training.checkpoint_folder import require_latest
from megatron_offgrpo.training.inputs import open_architecture
from megatron_offgrpo.training.reference_cache import inputs_of, write_reference
from megatron_offgrpo.training.student import Student, build_student, run_packs
from megatron_offgrpo.training.watchdog import Watchdog

PackLogprobs = tuple[list[int], np.ndarray, np.ndarray]
"""Trajectories of a pack, places of this rank's rows among their response tokens, log-probs of these rows."""
PACKS_PER_ROUND = 64
"""Packs of one data-parallel rank between two gatherings, less what interleaved stages need for a multiple."""


def compute_reference(run: RunConfig, place: Placement, *, force: bool = False) -> None:
    """Computes REFERENCE at `paths.reference`; a finished one from the same inputs is kept unless `force`."""
    store = TrajectoryStore.open(run.paths.store)
    checkpoint, manifest = require_latest(run.paths.megatron)
    architecture = open_architecture(run, store, manifest)
    inputs = inputs_of(store, manifest.fingerprint, run.model.precision, architecture)
    if not force and _is_current(Path(run.paths.reference), inputs):
        if place.is_writer:
            say(f"reference: {run.paths.reference} is up to date")
        return
    with Watchdog(Path(run.paths.reference).parent, place.rank, run.fault.timeout_seconds) as watchdog:
        watchdog.alive("loading")
        with closing(build_student(architecture, run)) as student:
            load_weights(student, checkpoint)
            logprobs = reference_logprobs(student, store, run, place, alive=watchdog.alive)
        watchdog.alive("writing the reference")
        if place.is_writer:
            assert logprobs is not None
            write_reference(run.paths.reference, logprobs, inputs, to_dict(run))
        dist.barrier()


def _is_current(folder: Path, inputs: dict[str, str]) -> bool:
    if not (folder / MANIFEST).exists():
        return False
    return read_manifest(folder, "reference", remedy="delete it").inputs == inputs


def reference_logprobs(
    student: Student,
    store: TrajectoryStore,
    run: RunConfig,
    place: Placement,
    *,
    alive: Callable[[str], None] = lambda doing: None,
) -> np.ndarray | None:
    """fp32 log-probs of every response token in store order, on the writer; None on the other ranks.

    The packs are those of the plan's first epoch, then packs of what that epoch leaves out: at the same layout step 0
    computes the very same packs, and its log-probs equal the reference to the bit.

    Args:
        alive: called for each pack, with what is done.
    """
    order, shares = reference_order(store, run.plan, run.objective)
    packs = [_members(trajectories, store, shares=shares) for trajectories in order]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(store.response_lengths)])
    lengths = store.prompt_lengths + store.response_lengths
    costs = [
        float(sum((store.response_lengths if m.continues else lengths)[m.trajectory] for m in members))
        for members in packs
    ]
    group = run.layout.pp if run.layout.vpp > 1 else 1
    mine = assign(costs, place.dp, group)[place.dp_rank]
    size = max(PACKS_PER_ROUND // group, 1) * group
    logprobs = np.full(offsets[-1], np.nan, np.float32) if place.is_writer else None
    rounds = [mine[start : start + size] for start in range(0, len(mine), size)]
    with progress("reference", len(mine), enabled=place.is_writer) as advance:
        for numbers in rounds:
            members = [packs[n] if n is not None else [] for n in numbers]
            results = _forward(members, student, store, run, place, alive)
            _gather(results, logprobs, offsets, place)
            advance(len(numbers))
    return logprobs


def _members(trajectories: list[int], store: TrajectoryStore, *, shares: bool) -> list[Member]:
    groups = store.group_index[trajectories]
    shared = continuing(groups, np.zeros_like(groups)) & shares
    return [Member(t, continues=c) for t, c in zip(trajectories, shared.tolist(), strict=True)]


def _forward(
    packs: list[list[Member]],
    student: Student,
    store: TrajectoryStore,
    run: RunConfig,
    place: Placement,
    alive: Callable[[str], None],
) -> list[PackLogprobs]:
    """Of each pack, on ranks that report."""

    def make(members: list[Member]) -> Batch:
        alive("a pack of the reference")
        return build_batch(
            store,
            members,
            pack=None,
            pack_multiple=run.plan.pack_multiple,
            reference=None,
            device=place.device,
            cp=place.cp,
            cp_rank=place.cp_rank,
        )

    def keep(batch: Batch, output_2R: Tensor) -> tuple[Tensor, Any]:
        return output_2R.sum(), ([m.trajectory for m in batch.members], batch.row_places, output_2R[0].detach().float())

    with torch.no_grad():
        results = run_packs(
            student.wrapped,
            lambda: map(make, packs),
            len(packs),
            keep,
            max_pack_tokens=run.plan.max_pack_tokens,
            forward_only=True,
        )
    return [(members, places, logp.cpu().numpy()) for members, places, logp in results] if place.reports_loss else []


def _gather(results: list[PackLogprobs], logprobs: np.ndarray | None, offsets: np.ndarray, place: Placement) -> None:
    """Brings every rank's log-probs to the writer and puts them in store order."""
    gathered: list[Any] | None = [None] * place.world_size if place.is_writer else None
    dist.gather_object(results, gathered)
    if logprobs is None:
        return
    assert gathered is not None
    for members, places, values in (pack for rank in gathered for pack in rank):
        if members:
            targets = np.concatenate([np.arange(offsets[member], offsets[member + 1]) for member in members])
            logprobs[targets[places]] = values
