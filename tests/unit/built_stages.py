"""Parameters that Megatron builds for the stages of a recipe, without their memory and without the other GPUs."""

import functools
import json
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.model.gpt import build_model
from megatron_offgrpo.model.published import find_architecture
from megatron_offgrpo.parallel import portable, runtime
from megatron_offgrpo.recipe import load_recipe


def built_parameters(run: RunConfig, stage: int) -> int:
    """On the meta device, as the last rank of a stage in a process group that only says that the others are there."""
    # Pipeline stages are Megatron's outermost dimension.
    layout, world_size = run.layout, run.layout.processes
    rank = world_size * (stage + 1) // layout.pp - 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    place = runtime.place(layout, seed=0)
    assert (place.is_first_stage, place.is_last_stage) == (stage == 0, stage == layout.pp - 1)
    with torch.device("meta"):
        chunks = build_model(find_architecture(run.paths.hf_model)[0], layout, run.model)
    runtime.stop()
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())


def write_built_parameters(output: str, recipes: list[str]) -> None:
    """Recipe -> stage -> parameters on a rank of it, for the first and the last stage, as JSON."""
    portable.install()
    # Groups over gloo would look for the other ranks.
    parallel_state.initialize_model_parallel = functools.partial(
        parallel_state.initialize_model_parallel, create_gloo_process_groups=False
    )
    # Most of the time, for numbers that are nowhere.
    layers._initialize_affine_weight_cpu = lambda *_, **__: None
    found = {}
    for name in recipes:
        run = load_recipe(name)
        found[name] = {stage: built_parameters(run, stage) for stage in {0, run.layout.pp - 1}}
    Path(output).write_text(json.dumps(found))
