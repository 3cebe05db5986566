"""Starts and ends the process groups, and answers where this process is in the layout."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.parallel import adamw, local, portable

JOIN_MINUTES = 30
"""The least limit of a group: ranks may start long after each other."""


@dataclass(frozen=True)
class Placement:
    """This process in the layout; `dp` and its rank do not count context-parallel ranks."""

    rank: int
    world_size: int
    dp: int
    dp_rank: int
    tp_rank: int
    cp: int
    cp_rank: int
    is_first_stage: bool
    is_last_stage: bool
    device: torch.device

    def sum_over_context_parallel(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share a pack, forward and backward."""
        if self.cp == 1:
            return values
        from megatron.core import parallel_state

        return all_reduce(values, group=parallel_state.get_context_parallel_group())

    @property
    def is_writer(self) -> bool:
        """The one process that prints and writes files."""
        return self.rank == 0

    @property
    def reports_loss(self) -> bool:
        """Last stage, first of its tensor-parallel group: each data- and context-parallel share counts once."""
        return self.is_last_stage and self.tp_rank == 0


def start(layout: LayoutConfig, *, seed: int, fault_seconds: float = 1800.0) -> Placement:
    """Joins the process group (torchrun's or srun's environment; alone without one) and makes Megatron's groups.

    Args:
        fault_seconds: `fault.timeout_seconds`. The groups end a rank that waits longer, without its stacks: their own
            limit comes after that of the watchdog.
    """
    portable.install()
    world_size = local.world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        _join(world_size, timedelta(minutes=group_minutes(fault_seconds)))
    return place(layout, seed, fault_seconds=fault_seconds)


def group_minutes(fault_seconds: float) -> int:
    """How long a rank waits in a collective, or for the others to join."""
    return max(JOIN_MINUTES, math.ceil(fault_seconds / 60) + 5)


def _join(world_size: int, timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def place(layout: LayoutConfig, seed: int, *, fault_seconds: float = 1800.0) -> Placement:
    """Makes Megatron's process groups for `layout` over the joined processes."""
    adamw.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1 if layout.ep > 1 else None,
        # Megatron's groups do not take the limit of the world's group.
        distributed_timeout_minutes=group_minutes(fault_seconds),
    )
    model_parallel_cuda_manual_seed(seed + 1, force_reset_rng=True)
    return Placement(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        cp=layout.cp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        is_first_stage=parallel_state.is_pipeline_first_stage(),
        is_last_stage=parallel_state.is_pipeline_last_stage(),
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
    )


def _leave_groups() -> None:
    """Leaves Megatron's groups of an earlier layout; Megatron only forgets them, and over gloo their threads go on."""
    from megatron.core import parallel_state

    for group in parallel_state._global_process_group_list or []:
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def stop() -> None:
    """Leaves the process groups."""
    _leave_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
