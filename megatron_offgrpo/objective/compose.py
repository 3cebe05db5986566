"""The objective on the response rows of one pack: surrogate, KL and entropy terms, weighted and summed.

    loss = sum_t  w_t * surrogate(logp_t, mu_t, A_i)  +  v_t * (beta * kl(logp_t, ref_t) - c * H_t)

The weights come from the plan, so the sum over all packs of a step does not depend on how they were packed, on the
micro-batches or on the layout. Knows no Megatron; docs/objective.md lists every metric with its formula.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_offgrpo.config import ObjectiveConfig
from megatron_offgrpo.metrics import Max, Mean, Metric, Metrics, Sum
from megatron_offgrpo.objective.needs import needs_of

ReduceTrajectories = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TokenTerms:
    """One row per response token of a pack: float tensors [R] in fp32 (float64 to check gradients).

    R may be 0 (a zero-weight pack): the loss is then 0 and still part of the graph.
    """

    logp: Tensor
    """log pi(token), natural log, differentiable."""
    entropy: Tensor
    """H of the whole distribution at the token's position, in nats, differentiable."""
    mu: Tensor
    """Behaviour log-prob; 0 where unknown."""
    ref: Tensor
    """Reference log-prob; zeros where no term reads it."""
    on_policy: Tensor
    """bool [R], the row's trajectory is the student's own."""
    advantage: Tensor
    """A of the row's trajectory."""
    reward: Tensor
    """Reward of the row's trajectory; above 0 counts as right in the metrics."""
    weight: Tensor
    """w_t; 0 for masked tokens."""
    kl_weight: Tensor
    """v_t."""
    trajectory: Tensor
    """long [R], index of the row's trajectory in the pack, 0 to K - 1."""
    trajectory_advantage: Tensor
    """[K], A of each trajectory of the pack; under context parallelism also of those without a row here."""
    group_bounds: tuple[int, ...]
    """(0, ..., K): group g of the pack has the trajectories group_bounds[g] to group_bounds[g + 1] - 1."""


class StackedMetrics(NamedTuple):
    """Metrics of one or more micro-batches as two device tensors, so that only the step's end waits for the device.

    Micro-batches and ranks combine by adding `sums` and taking the elementwise maximum of `maxima`.
    """

    sums: Tensor
    """float64 [len(SUM_NAMES)]."""
    maxima: Tensor
    """float64 [len(MAX_NAMES)]; -inf where nothing was counted."""

    def combine(self, other: "StackedMetrics") -> "StackedMetrics":
        """Both parts of the same step together."""
        return StackedMetrics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))


_SUMS = ("loss", "surrogate", "kl_term", "entropy_term")
# Name of a mean -> the count it is divided by.
_MEANS = {
    "kl": "kl_tokens",
    "kl_clamped": "kl_tokens",
    "entropy": "tokens",
    "ratio": "tokens",
    "clipped": "signal_tokens",
    "logp_right": "right_tokens",
    "logp_wrong": "wrong_tokens",
    "probability_right": "right_tokens",
    "probability_wrong": "wrong_tokens",
}
_COUNTS = ("tokens", "kl_tokens", "signal_tokens", "right_tokens", "wrong_tokens")
SUM_NAMES = _SUMS + tuple(_MEANS) + _COUNTS
MAX_NAMES = ("ratio_max", "max_abs_logp_difference")


def offline_grpo_loss(
    terms: TokenTerms, objective: ObjectiveConfig, reduce_trajectories: ReduceTrajectories = lambda sums_K: sums_K
) -> tuple[Tensor, StackedMetrics]:
    """The loss summed over the given rows, and its metrics.

    Args:
        terms: the rows of this rank; rows of one trajectory may lie on several context-parallel ranks.
        reduce_trajectories: sums a tensor [K] over the context-parallel ranks, in the forward AND in the backward
            pass (every rank's rows depend on the sum). Called only for surrogates of unit trajectory or group.

    Returns:
        The scalar loss in the rows' dtype, and detached metrics.
    """
    surrogate = _surrogate(terms, terms.logp, objective.surrogate, reduce_trajectories)
    loss_surrogate = (terms.weight * surrogate).sum()
    loss_entropy = -objective.entropy_coefficient * (terms.kl_weight * terms.entropy).sum()
    if objective.beta:
        kl = objective.kl(terms.logp, terms.ref)
        loss_kl = objective.beta * (terms.kl_weight * kl).sum()
    else:
        kl, loss_kl = None, torch.zeros_like(loss_surrogate)
    loss = loss_surrogate + loss_kl
    if objective.entropy_coefficient:
        loss = loss + loss_entropy
    gradient = _surrogate_gradient(terms, objective.surrogate, reduce_trajectories)
    with torch.no_grad():
        parts = {"loss": loss, "surrogate": loss_surrogate, "kl_term": loss_kl, "entropy_term": loss_entropy}
        return loss, _metrics(terms, parts, kl, _clamp_of(objective.kl), gradient)


def to_metrics(stacked: StackedMetrics) -> Metrics:
    """The metrics by name with their reductions; the one place that waits for the device.

    A mean or maximum of nothing (the KL without a reference, right trajectories where none is right) is left out.
    """
    sums = dict(zip(SUM_NAMES, stacked.sums.tolist(), strict=True))
    metrics: dict[str, Metric] = {name: Sum(sums[name]) for name in (*_SUMS, "tokens")}
    metrics |= {name: Mean(sums[name], sums[count]) for name, count in _MEANS.items() if sums[count]}
    maxima = zip(MAX_NAMES, stacked.maxima.tolist(), strict=True)
    return metrics | {name: Max(value) for name, value in maxima if value != -math.inf}


def results(metrics: Metrics) -> dict[str, float]:
    """The values to log, with the margins (right minus wrong) where both sides were counted."""
    values = {name: metric.result() for name, metric in metrics.items()}
    for name in ("probability", "logp"):
        if f"{name}_right" in values and f"{name}_wrong" in values:
            values[f"{name}_margin"] = values[f"{name}_right"] - values[f"{name}_wrong"]
    return values


def _surrogate(terms: TokenTerms, logp: Tensor, function: Callable[..., Any], reduce: ReduceTrajectories) -> Tensor:
    """The surrogate of each row [R]; the value of a trajectory or group stands in each of its rows."""
    needs = needs_of(function)
    if needs.unit == "token":
        return function(logp, terms.mu, terms.advantage, **{name: getattr(terms, name) for name in needs.takes})

    def summed(rows: Tensor) -> Tensor:
        sums_K = rows.new_zeros(len(terms.trajectory_advantage))
        return reduce(sums_K.index_add(0, terms.trajectory, rows))

    logp_K, mu_K = summed(logp), summed(terms.mu)
    # An empty response has no rows, but is a member of its group: its sums are 0, and no mean is taken over 0 tokens.
    num_tokens_K = summed(torch.ones_like(terms.mu)).clamp(min=1.0)
    arguments = (logp_K, mu_K, terms.trajectory_advantage, num_tokens_K)
    extra = {name: summed(getattr(terms, name)) for name in needs.takes}
    if needs.unit == "trajectory":
        return function(*arguments, **extra)[terms.trajectory]
    values_K = [
        function(*(vector[part] for vector in arguments), **{name: vector[part] for name, vector in extra.items()})
        .reshape(1)
        .expand(part.stop - part.start)
        for part in map(slice, terms.group_bounds[:-1], terms.group_bounds[1:])
    ]
    # A zero-weight pack has no group; its loss stays part of the graph.
    return torch.cat([logp_K[:0], *values_K])[terms.trajectory]


def _surrogate_gradient(terms: TokenTerms, function: Callable[..., Any], reduce: ReduceTrajectories) -> Tensor:
    """d surrogate / d logp of each row [R], unweighted; a few elementwise operations next to the head's."""
    with torch.enable_grad():
        logp = terms.logp.detach().requires_grad_()
        total = _surrogate(terms, logp, function, reduce).sum()
        return torch.autograd.grad(total, logp, allow_unused=True, materialize_grads=True)[0]


def _clamp_of(kl: Callable[..., Any]) -> float:
    """The value of the divergence's `clamp` argument, bound or default; inf without one."""
    parameter = inspect.signature(kl).parameters.get("clamp")
    return math.inf if parameter is None or parameter.default is None else float(parameter.default)


def _metrics(
    terms: TokenTerms, parts: dict[str, Tensor], kl: Tensor | None, clamp: float, gradient: Tensor
) -> StackedMetrics:
    counted = terms.weight > 0
    right, wrong = counted & (terms.reward > 0), counted & (terms.reward <= 0)
    signal = counted & (terms.advantage != 0)
    nothing = torch.zeros_like(counted)
    kl_counted = nothing if kl is None else counted
    probability, ratio = terms.logp.exp(), (terms.logp - terms.mu).exp()

    def total(values: Tensor, rows: Tensor) -> Tensor:
        return torch.where(rows, values.double(), 0.0).sum()

    def largest(values: Tensor, rows: Tensor) -> Tensor:
        masked = torch.where(rows, values.double(), -math.inf)
        return torch.cat([masked, masked.new_full((1,), -math.inf)]).amax()

    values = {name: part.double() for name, part in parts.items()} | {
        "kl": total(nothing if kl is None else kl, kl_counted),
        "kl_clamped": total(nothing if kl is None else kl.abs() >= clamp, kl_counted),
        "entropy": total(terms.entropy, counted),
        "ratio": total(ratio, counted),
        "clipped": total(gradient == 0, signal),
        "logp_right": total(terms.logp, right),
        "logp_wrong": total(terms.logp, wrong),
        "probability_right": total(probability, right),
        "probability_wrong": total(probability, wrong),
        "tokens": counted.sum(),
        "kl_tokens": kl_counted.sum(),
        "signal_tokens": signal.sum(),
        "right_tokens": right.sum(),
        "wrong_tokens": wrong.sum(),
    }
    maxima = [largest(ratio, counted), largest((terms.logp - terms.ref).abs(), kl_counted)]
    return StackedMetrics(torch.stack([values[name].double() for name in SUM_NAMES]), torch.stack(maxima))
