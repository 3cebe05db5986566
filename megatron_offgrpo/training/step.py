"""One optimizer step over the packs the plan gives it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_offgrpo.config import ObjectiveConfig, RunConfig
from megatron_offgrpo.errors import TrainingError
from megatron_offgrpo.metrics import Metrics
from megatron_offgrpo.objective.compose import MAX_NAMES, SUM_NAMES, StackedMetrics, offline_grpo_loss, to_metrics
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.training.batch import Batch
from megatron_offgrpo.training.stage_clock import StageClock
from megatron_offgrpo.training.student import Student, run_packs

MakeBatch = Callable[[int | None], Batch]
"""Pack number, or None for a zero-weight pack -> the batch."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports, equal on all ranks but for the times."""

    metrics: Metrics
    grad_norm: float
    """Global gradient norm before clipping."""
    forward_backward_seconds: float
    """Without the time in which batches were made."""
    optimizer_seconds: float
    """Looking at the gradients and the update."""


class BadStepError(TrainingError):
    """A loss or gradient that is NaN or inf, or too large a gradient; equal on all ranks."""

    def __init__(self, what: str, pack: int, batch: Batch, *, whose: str = "", **details: Any) -> None:
        self.pack = pack
        self.trajectories = tuple(sorted({member.trajectory for member in batch.members}))
        names = ", ".join(map(str, self.trajectories))
        super().__init__(what, where=f"{whose}pack {pack} (trajectories {names})", **details)


def train_step(
    student: Student,
    packs: Sequence[int | None],
    make_batch: MakeBatch,
    run: RunConfig,
    place: Placement,
    lr: float,
) -> StepResult:
    """Forward and backward over this rank's packs, then one update of the weights.

    Raises:
        BadStepError: a loss or gradient is NaN or inf, or the gradient norm is above the run's bound; the weights are
            as before the step.
    """
    clock = StageClock()
    metrics, bad_pack = compute_gradients(
        student, packs, clock.timed("batches", make_batch, within="forward_backward"), run, place
    )
    # The metrics have been read, so the device has finished with what came before them.
    clock.ends("forward_backward")
    if bad_pack is None and _any_rank(not student.gradients_are_finite(), place):
        bad_pack = _find_bad_pack(student, packs, make_batch, run, place)
        if bad_pack is None:
            worst = _largest_pack(student, packs, make_batch, run, place)
            raise BadStepError(
                "each pack's gradient is finite, but their sum is NaN or inf; the weights were not changed",
                worst,
                make_batch(worst),
                whose="the largest in ",
                remedy="an overflow where gradients are this large; else look at the memory and links of the devices",
            )
    if bad_pack is not None:
        raise BadStepError(
            "NaN or inf in the loss or a gradient; the weights were not changed",
            bad_pack,
            make_batch(bad_pack),
            remedy="look at these trajectories in the store, and at the surrogate, the KL clamp and the learning rate",
        )
    bound = run.fault.max_grad_norm
    if bound and (norm := _grad_norm(student)) > bound:
        worst = _largest_pack(student, packs, make_batch, run, place)
        raise BadStepError(
            "the gradient norm is above its bound; the weights were not changed",
            worst,
            make_batch(worst),
            whose="the largest in ",
            expected=f"at most fault.max_grad_norm = {bound:g}",
            got=f"{norm:.4g}",
        )
    for group in student.optimizer.param_groups:
        group["lr"] = lr
    _, grad_norm, _ = student.optimizer.step()
    if place.device.type == "cuda":
        # The loop waits for the device right after the step in any case: ranks agree on whether to stop.
        torch.cuda.synchronize()
    clock.ends("optimizer")
    seconds = clock.seconds
    return StepResult(to_metrics(metrics), float(grad_norm), seconds["forward_backward"], seconds["optimizer"])


def compute_gradients(
    student: Student, packs: Sequence[int | None], make_batch: MakeBatch, run: RunConfig, place: Placement
) -> tuple[StackedMetrics, int | None]:
    """Leaves the step's gradient in the student's buffers, summed over the whole layout.

    Returns:
        The step's metrics over all ranks, and the first pack whose loss is NaN or inf.
    """
    student.zero_grad()
    parts = run_packs(
        student.wrapped,
        lambda: map(make_batch, packs),
        len(packs),
        lambda batch, output_2R: _loss(batch, output_2R, run.objective, place),
        max_pack_tokens=run.plan.max_pack_tokens,
    )
    return reduce_metrics(parts, packs, place)


def _loss(
    batch: Batch, output_2R: Tensor, objective: ObjectiveConfig, place: Placement
) -> tuple[Tensor, StackedMetrics]:
    return offline_grpo_loss(batch.terms(output_2R[0], output_2R[1]), objective, place.sum_over_context_parallel)


def reduce_metrics(
    parts: list[StackedMetrics], packs: Sequence[int | None], place: Placement
) -> tuple[StackedMetrics, int | None]:
    """Adds up the packs of all ranks; only the last stage's first tensor-parallel rank has any to add."""
    sums = torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=place.device)
    maxima = torch.full((len(MAX_NAMES) + 1,), -torch.inf, dtype=torch.float64, device=place.device)
    if place.reports_loss:
        total = parts[0]
        for part in parts[1:]:
            total = total.combine(part)
        sums, maxima[:-1] = total.sums, total.maxima
        losses = torch.stack([part.sums[SUM_NAMES.index("loss")] for part in parts]).tolist()
        bad = [pack for pack, loss in zip(packs, losses, strict=True) if not abs(loss) < float("inf")]
        if bad:
            # Negative, so that the maximum over ranks is the first bad pack; a zero-weight pack has loss 0.
            maxima[-1] = -float(bad[0] or 0)
    dist.all_reduce(sums)
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    bad_pack = None if maxima[-1] == -torch.inf else int(-maxima[-1])
    return StackedMetrics(sums, maxima[:-1]), bad_pack


def _any_rank(flag: bool, place: Placement) -> bool:
    value = torch.tensor(float(flag), device=place.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def _grad_norm(student: Student) -> float:
    """Global gradient norm, before clipping; leaves what the step needs as it is."""
    student.optimizer.prepare_grads()
    return float(student.optimizer.get_grad_norm())


def _gradients_alone(
    student: Student, packs: Sequence[int | None], make_batch: MakeBatch, run: RunConfig, place: Placement
) -> Iterator[int]:
    """Leaves the gradient of one pack alone in the buffers, pack by pack of every data-parallel rank; its number.

    Gradients are summed over packs and ranks, so the sum does not say which pack it was. Ranks take turns, which takes
    time; a bad step is worth it.
    """
    # Interleaved stages take packs in multiples of the pipeline's size.
    filling = [None] * (run.layout.pp - 1) if run.layout.vpp > 1 else []
    for dp_rank in range(place.dp):
        for pack in packs if place.dp_rank == dp_rank else [None] * len(packs):
            compute_gradients(student, [pack, *filling], make_batch, run, place)
            found = torch.tensor(-1 if pack is None else pack, device=place.device)
            dist.all_reduce(found, dist.ReduceOp.MAX)
            if found >= 0:
                yield int(found)


def _find_bad_pack(
    student: Student, packs: Sequence[int | None], make_batch: MakeBatch, run: RunConfig, place: Placement
) -> int | None:
    """The first pack whose gradient alone is not finite; None where only the sum is not."""
    for pack in _gradients_alone(student, packs, make_batch, run, place):
        if _any_rank(not student.gradients_are_finite(), place):
            return pack
    return None


def _largest_pack(
    student: Student, packs: Sequence[int | None], make_batch: MakeBatch, run: RunConfig, place: Placement
) -> int:
    """The pack whose gradient alone has the largest norm."""
    norms = {pack: _grad_norm(student) for pack in _gradients_alone(student, packs, make_batch, run, place)}
    return max(norms, key=norms.__getitem__)
