"""Qwen3-8B and the mixture of experts Qwen3-30B-A3B with the released settings."""

from dataclasses import replace

from megatron_offgrpo.config import LayoutConfig, RunConfig
from recipes.openthinker3 import openthinker3_7b
from recipes.paths import run_paths
from recipes.sizes import on_80gb


def qwen3_8b() -> RunConfig:
    """8 x 80 GB."""
    return replace(openthinker3_7b(), name="qwen3_8b", paths=run_paths("qwen3_8b", "Qwen3-8B"))


def qwen3_8b_32x80gb() -> RunConfig:
    """Four nodes."""
    return on_80gb(qwen3_8b(), 32, model={"recompute": "none"})


def qwen3_8b_64x80gb() -> RunConfig:
    """Eight nodes."""
    return on_80gb(qwen3_8b(), 64, model={"recompute": "none"})


def qwen3_30b_a3b() -> RunConfig:
    """8 x 80 GB, with little room to spare: 18 bytes a parameter over eight GPUs are most of it."""
    return replace(
        openthinker3_7b(),
        name="qwen3_30b_a3b",
        paths=run_paths("qwen3_30b_a3b", "Qwen3-30B-A3B"),
        layout=LayoutConfig(tp=4, pp=2, sequence_parallel=True, processes=8),
    )


def qwen3_30b_a3b_32x80gb() -> RunConfig:
    """Four nodes, whole experts on eight ranks."""
    return on_80gb(qwen3_30b_a3b(), 32, layout={"pp": 1, "ep": 8})


def qwen3_30b_a3b_64x80gb() -> RunConfig:
    """Eight nodes, whole experts on eight ranks."""
    return on_80gb(qwen3_30b_a3b(), 64, layout={"pp": 1, "ep": 8})
