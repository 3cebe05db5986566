"""Which layouts a model can take, which of them fit into memory, and which is likely the fastest."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy.typing as npt

from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.errors import ConfigError
from megatron_offgrpo.planning.assignment import assign, imbalance
from megatron_offgrpo.planning.divides import check_divides
from megatron_offgrpo.planning.hardware import GPUS_PER_NODE, Hardware
from megatron_offgrpo.planning.memory import Memory, memory_per_rank
from megatron_offgrpo.planning.shape import ModelShape

Recompute = Literal["none", "selective", "full"]
LOSS_PER_DOUBLING = {"tp": 0.05, "pp": 0.03, "cp": 0.03, "ep": 0.04}
"""Assumed share of the time that each doubling adds in communication; only orders layouts that all fit."""
BETWEEN_NODES = 3.0
"""Assumed factor on that loss for a doubling that leaves the node."""
RECOMPUTE_COST: dict[Recompute, float] = {"none": 0.0, "selective": 0.02, "full": 1 / 3}
"""Share of the time that recomputing adds: a third of forward and backward, or some of the attention."""
MOST_GPUS = 4096


@dataclass(frozen=True)
class Proposal:
    """A layout that fits."""

    num_gpus: int
    layout: LayoutConfig
    recompute: Recompute
    offload: bool
    """The optimizer is in the hosts' memory."""
    memory: Memory

    def settings(self) -> str:
        """As `--set` options."""
        layout = self.layout
        names = ("tp", "pp", "vpp", "cp", "ep")
        values = [f"layout.{name}={getattr(layout, name)}" for name in names]
        values += [f"layout.sequence_parallel={str(layout.sequence_parallel).lower()}"]
        values += [f"layout.processes={self.num_gpus}", f"model.recompute={self.recompute}"]
        values += ["optimizer.cpu_offload=true", "checkpoint.format=reshardable"] if self.offload else []
        return " ".join(f"--set {value}" for value in values)


def propose(
    shape: ModelShape, run: RunConfig, hardware: Hardware, *, pack_costs: npt.ArrayLike, keys_per_token: float = 1.0
) -> Proposal | None:
    """The layout that fits and is likely the fastest; None where none fits.

    Time is taken as proportional to (1 + recompute) (1 + bubble) (dearest data-parallel rank / mean) communication
    with LOSS_PER_DOUBLING and BETWEEN_NODES.

    Args:
        pack_costs: float [n], FLOPs of the packs of a typical step, or one number for each where they are not known.
        keys_per_token: as for `memory_per_rank`.
    """

    @functools.cache
    def spread(dp: int) -> tuple[float, int]:
        """The dearest rank over the mean, and the packs of each rank."""
        ranks = assign(pack_costs, dp)
        return 1 + imbalance(pack_costs, ranks), len(ranks[0])

    best: tuple[tuple[float, ...], Proposal] | None = None
    offload = run.optimizer.cpu_offload
    for layout in _layouts(shape, run, hardware.num_gpus):
        for recompute, again in RECOMPUTE_COST.items():
            model = replace(run.model, recompute=recompute)
            memory = memory_per_rank(
                shape,
                layout,
                model,
                num_gpus=hardware.num_gpus,
                max_pack_tokens=run.plan.max_pack_tokens,
                keys_per_token=keys_per_token,
                offload=offload,
            )
            if memory.total > hardware.usable_bytes:
                continue
            unevenness, packs = spread(layout.data_parallel_size(hardware.num_gpus))
            time = (1 + again) * unevenness * _bubble(shape, layout, packs) * _communication(layout)
            rank = (time, layout.pp, layout.tp, layout.cp, layout.ep)
            if best is None or rank < best[0]:
                best = rank, Proposal(hardware.num_gpus, layout, recompute, offload, memory)
    return best[1] if best else None


def propose_more(
    shape: ModelShape, run: RunConfig, hardware: Hardware, *, pack_costs: npt.ArrayLike, keys_per_token: float = 1.0
) -> Proposal | None:
    """A layout on twice as many GPUs, or four times, and so on, where this number is too small."""
    num_gpus = hardware.num_gpus * 2
    while num_gpus <= MOST_GPUS:
        more = replace(hardware, num_gpus=num_gpus)
        found = propose(shape, run, more, pack_costs=pack_costs, keys_per_token=keys_per_token)
        if found:
            return found
        num_gpus *= 2
    return None


def proposals(
    shape: ModelShape, run: RunConfig, hardware: Hardware, *, pack_costs: npt.ArrayLike, keys_per_token: float = 1.0
) -> list[Proposal]:
    """The layout that fits into this hardware, else two others as far as they exist: here with the optimizer in the
    hosts' memory, and on more GPUs.
    """
    find = functools.partial(propose, shape, pack_costs=pack_costs, keys_per_token=keys_per_token)
    here = find(run, hardware)
    if here is not None:
        return [here]
    others = [propose_more(shape, run, hardware, pack_costs=pack_costs, keys_per_token=keys_per_token)]
    if run.model.weight_precision == "bf16":
        offloads = with_values(run, optimizer={"cpu_offload": True})
        others.insert(0, find(offloads, hardware))
    return [other for other in others if other is not None]


def _layouts(shape: ModelShape, run: RunConfig, num_gpus: int) -> Iterator[LayoutConfig]:
    """All that divide the model, the GPUs and the packs; tensor parallelism with sequence parallelism."""
    node = min(GPUS_PER_NODE, num_gpus)
    for tp in _divisors(node):
        for cp in (1, 2, 4, 8, 16):
            for pp in _divisors(math.gcd(num_gpus, shape.num_layers)):
                for ep in _divisors(shape.num_experts) if shape.num_experts else [1]:
                    layout = LayoutConfig(tp=tp, pp=pp, cp=cp, ep=ep, sequence_parallel=tp > 1, processes=num_gpus)
                    try:
                        check_divides(shape, layout, run.model)
                        replace(run, layout=layout).check_layout(num_gpus)
                    except ConfigError:
                        continue
                    yield layout


def _bubble(shape: ModelShape, layout: LayoutConfig, packs: int) -> float:
    """Time of a pipeline over that of its busy part."""
    # The last stage has the head besides its layers, and the others wait for it.
    head = shape.embedding / (shape.embedding + shape.matmul_parameters_per_token)
    return (1 + (layout.pp - 1) / (layout.vpp * packs)) * (1 + head * (layout.pp - 1))


def _communication(layout: LayoutConfig) -> float:
    """Time over that without any communication."""
    factor = 1.0
    for name, loss in LOSS_PER_DOUBLING.items():
        size = getattr(layout, name)
        # Tensor-parallel ranks lie side by side, context-parallel ones beyond them.
        inside = min(size, {"pp": size, "cp": GPUS_PER_NODE // layout.tp}.get(name, GPUS_PER_NODE))
        factor += loss * (math.log2(inside) + BETWEEN_NODES * math.log2(size / inside))
    return factor


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
