"""What a step of training logs besides the objective's metrics: times by stage, rates, memory; docs/objective.md."""

import resource

import torch
import torch.distributed as dist

from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.planning.flops import pack_flops
from megatron_offgrpo.planning.hardware import peak_tflops_of
from megatron_offgrpo.planning.plan import Plan
from megatron_offgrpo.planning.shape import ModelShape
from megatron_offgrpo.training.step import StepResult


def step_values(
    plan: Plan, step: int, shape: ModelShape, result: StepResult, seconds: float, place: Placement, precision: str
) -> dict[str, float]:
    """Sizes, times, rates and memory of a step; docs/objective.md has the formulas."""
    packs = plan.packs_of_step(step)
    tokens = int(plan.pack_tokens[packs.start : packs.stop].sum())
    padded = int(plan.pack_padded[packs.start : packs.stop].sum())
    trajectories = plan.num_trajectories_of_step(step)
    flops_per_second = model_flops(plan, packs, shape) / seconds
    values = {
        "trajectories": trajectories,
        "packs": len(packs),
        "padded_tokens": padded,
        "packed_tokens": tokens,
        "seconds": seconds,
        # What is left of the step: choosing this rank's packs and making their batches.
        "batch_seconds": seconds - result.forward_backward_seconds - result.optimizer_seconds,
        "forward_backward_seconds": result.forward_backward_seconds,
        "optimizer_seconds": result.optimizer_seconds,
        "tokens_per_second": tokens / seconds,
        "trajectories_per_second": trajectories / seconds,
        "model_flops_per_second": flops_per_second,
        "peak_memory_bytes": _peak_memory_bytes(place),
    }
    peak = peak_flops_per_second(place.device, precision)
    return values if peak is None else values | {"mfu": flops_per_second / (place.world_size * peak)}


def model_flops(plan: Plan, packs: range, shape: ModelShape) -> float:
    """FLOPs of the mathematics of these packs, forward and backward, without padding and recomputation."""
    padding = int((plan.pack_padded - plan.pack_tokens)[packs.start : packs.stop].sum())
    of_packs = float(pack_flops(plan, shape, packs=packs).sum())
    return of_packs - 6.0 * shape.matmul_parameters_per_token * padding


def peak_flops_per_second(device: torch.device, precision: str) -> float | None:
    """Of the GPU in bf16; None on a CPU, in fp32 and for a card that the table does not know."""
    if device.type != "cuda" or precision != "bf16":
        return None
    tflops = peak_tflops_of(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def _peak_memory_bytes(place: Placement) -> float:
    """Largest over ranks: allocated GPU memory, or the process's resident set on a CPU."""
    if torch.cuda.is_available():
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    value = torch.tensor(peak, dtype=torch.float64, device=place.device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)
