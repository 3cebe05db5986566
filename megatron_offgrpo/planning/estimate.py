"""What a plan takes on a number of GPUs: balance of the data-parallel ranks, seconds a step, hours."""

import itertools
from dataclasses import dataclass

import numpy as np

from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.planning.assignment import assign, imbalance
from megatron_offgrpo.planning.flops import HEAD, pack_flops
from megatron_offgrpo.planning.packing import lower_bound
from megatron_offgrpo.planning.plan import Plan
from megatron_offgrpo.planning.shape import ModelShape
from megatron_offgrpo.types import FloatArray, IntArray

ENOUGH_PACKS = 8
"""Packs a rank from which on FLOPs are expected to be within 2 %."""


@dataclass(frozen=True)
class Balance:
    """How even the data-parallel ranks are in FLOPs, attention included; dearest rank over the mean, minus 1."""

    dp: int
    worst: float
    """In the worst step."""
    worst_with_enough_packs: float | None
    """In the worst of the steps that give every rank 8 packs or more; None without such a step."""
    steps_with_enough_packs: int
    zero_weight_packs: int
    """Appended so that every rank has as many packs."""
    critical_flops: FloatArray
    """float64 [steps], of the dearest rank with its pipeline stages' idle time as if they computed."""


@dataclass(frozen=True)
class Cost:
    """What a run takes at an achieved rate."""

    step_seconds: float
    """Mean over the steps."""
    hours: float
    gpu_hours: float


def balance(plan: Plan, shape: ModelShape, layout: LayoutConfig, *, num_gpus: int, recompute: bool = False) -> Balance:
    """Assigns every step's packs to the data-parallel ranks, as training does, and adds up the FLOPs.

    A pipeline of p stages and v virtual ones idles (p - 1) / v packs' time in a step (Narayanan et al. 2021,
    section 2.2), and all its stages take as long as the last one, which has the head besides its layers.

    Raises:
        ConfigError: the number of GPUs does not fit the layout.
    """
    dp = layout.data_parallel_size(num_gpus)
    flops = pack_flops(plan, shape, recompute=recompute)
    worst, enough, empty = 0.0, [], 0
    critical = np.zeros(plan.num_steps)
    for step in range(plan.num_steps):
        packs = plan.packs_of_step(step)
        costs = flops[packs.start : packs.stop]
        ranks = assign(costs, dp, layout.pp if layout.vpp > 1 else 1)
        unevenness = imbalance(costs, ranks)
        places = len(ranks[0])
        first, last = np.searchsorted(plan.step, [step, step + 1])
        head = HEAD * shape.embedding * int(plan.response_tokens[first:last].sum())
        slowest_stage = costs.sum() + (layout.pp - 1) * head
        critical[step] = (1 + unevenness) * slowest_stage / dp * (1 + (layout.pp - 1) / (layout.vpp * places))
        worst = max(worst, unevenness)
        empty += dp * places - len(packs)
        if len(packs) >= ENOUGH_PACKS * dp:
            enough.append(unevenness)
    return Balance(dp, worst, max(enough, default=None), len(enough), empty, critical)


def typical_pack_flops(plan: Plan, shape: ModelShape) -> FloatArray:
    """Computed FLOPs of each pack of the step with the median FLOPs."""
    flops = pack_flops(plan, shape, recompute=False)
    of_steps = np.bincount(plan.pack_step, weights=flops)
    packs = plan.packs_of_step(int(of_steps.argsort(kind="stable")[len(of_steps) // 2]))
    return flops[packs.start : packs.stop]


def run_cost(balance: Balance, *, num_gpus: int, tflops_per_gpu: float) -> Cost:
    """Time of the run: per step, the dearest data-parallel rank's FLOPs over its GPUs' rate.

    Args:
        tflops_per_gpu: achieved 10^12 FLOP/s of one GPU while it computes, communication included.
    """
    seconds = balance.critical_flops / (num_gpus / balance.dp * tflops_per_gpu * 1e12)
    hours = float(seconds.sum()) / 3600
    return Cost(float(seconds.mean()), hours, hours * num_gpus)


def packs_lower_bound(plan: Plan) -> int:
    """Sum over the steps of the packs that any packing needs; where prompts are shared, at least so many."""
    capacity = plan.manifest.config["plan"]["max_pack_tokens"]
    capacity -= capacity % plan.manifest.config["plan"]["pack_multiple"]
    starts: IntArray = np.searchsorted(plan.step, np.arange(plan.num_steps + 1))
    if not plan.manifest.counts.get("shared_prompt_tokens"):
        return sum(lower_bound(plan.tokens[a:b].astype(np.int64), capacity) for a, b in itertools.pairwise(starts))
    # Each group's prompt once, or no prompt at all.
    bound = 0
    for a, b in itertools.pairwise(starts):
        responses = plan.response_tokens[a:b].astype(np.int64)
        _, first = np.unique(plan.group[a:b], return_index=True)
        tokens = int(responses.sum() + (plan.tokens[a:b] - responses)[first].sum())
        bound += max(-(-tokens // capacity), lower_bound(responses, capacity))
    return bound
