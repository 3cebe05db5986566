"""The objective on the store's validation groups during training, and the checkpoint that does best on them."""

import math

import torch
from torch import Tensor

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.objective.compose import StackedMetrics, offline_grpo_loss, results, to_metrics
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.training.batch import Batch
from megatron_offgrpo.training.step import MakeBatch, reduce_metrics
from megatron_offgrpo.training.student import Student, run_packs

PREFIX = "validation_"


def validate(
    student: Student, packs: list[int | None], make_batch: MakeBatch, run: RunConfig, place: Placement
) -> dict[str, float]:
    """The step metrics of docs/objective.md over the validation groups, each name with the prefix `validation_`.

    Args:
        packs: this rank's packs of the validation plan.
    """

    def loss(batch: Batch, output_2R: Tensor) -> tuple[Tensor, StackedMetrics]:
        terms = batch.terms(output_2R[0], output_2R[1])
        return offline_grpo_loss(terms, run.objective, place.sum_over_context_parallel)

    with torch.no_grad():
        parts = run_packs(
            student.wrapped,
            lambda: map(make_batch, packs),
            len(packs),
            loss,
            max_pack_tokens=run.plan.max_pack_tokens,
            forward_only=True,
        )
    stacked, _ = reduce_metrics(parts, packs, place)
    return {f"{PREFIX}{name}": value for name, value in results(to_metrics(stacked)).items()}


def is_better(values: dict[str, float], best: float | None, run: RunConfig) -> bool:
    """Whether the run's validation metric is finite and better than `best`.

    Raises:
        ConfigError: there is no such metric.
    """
    settings = run.validation
    name = f"{PREFIX}{settings.metric}"
    if name not in values:
        known = ", ".join(key.removeprefix(PREFIX) for key in values if key.startswith(PREFIX))
        raise ConfigError(
            "no such validation metric", where="validation.metric", expected=f"one of {known}", got=settings.metric
        )
    value = values[name]
    if not math.isfinite(value):
        return False
    # NaN, which an older version may have written, is never beaten by comparison.
    if best is None or not math.isfinite(best):
        return True
    return value > best if settings.best == "highest" else value < best
