"""Llama 3.3 70B with the released settings."""

from dataclasses import replace

from megatron_offgrpo.config import LayoutConfig, RunConfig
from recipes.openthinker3 import openthinker3_7b
from recipes.paths import run_paths


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
    base = llama3_70b()
    return replace(base, name="llama3_70b_32x80gb", layout=replace(base.layout, processes=32))
