"""Llama 3.3 70B with the released settings."""

from dataclasses import replace

from megatron_offgrpo.config import LayoutConfig, RunConfig
from recipes.openthinker3 import openthinker3_7b
from recipes.paths import run_paths
from recipes.sizes import OFFLOAD, on_80gb


def llama3_70b() -> RunConfig:
    """64 x 80 GB: tensor parallelism within a node, two pipeline stages."""
    return replace(
        openthinker3_7b(),
        name="llama3_70b",
        paths=run_paths("llama3_70b", "Llama-3.3-70B-Instruct"),
        layout=LayoutConfig(tp=8, pp=2, sequence_parallel=True, processes=64),
    )


def llama3_70b_32x80gb() -> RunConfig:
    """Four nodes."""
    return on_80gb(llama3_70b(), 32)


def llama3_70b_8x80gb() -> RunConfig:
    """8 x 80 GB, the optimizer in the node's memory (offload has not run on a GPU).

    It takes 788 GiB for the states, 263 for gradients on their way, and 788 more while a checkpoint is gathered.
    """
    return on_80gb(llama3_70b(), 8, layout={"pp": 1}, **OFFLOAD)
