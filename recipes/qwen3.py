"""Qwen3-8B and the mixture of experts Qwen3-30B-A3B with the released settings."""

from dataclasses import replace

from megatron_offgrpo.config import LayoutConfig, ModelConfig, RunConfig
from recipes.openthinker3 import openthinker3_7b
from recipes.paths import run_paths


def qwen3_8b() -> RunConfig:
    """8 x 80 GB."""
    return replace(openthinker3_7b(), name="qwen3_8b", paths=run_paths("qwen3_8b", "Qwen3-8B"))


def qwen3_8b_32x80gb() -> RunConfig:
    """Four nodes."""
    return replace(
        qwen3_8b(),
        name="qwen3_8b_32x80gb",
        layout=LayoutConfig(tp=4, sequence_parallel=True, processes=32),
        model=ModelConfig(precision="bf16", recompute="none"),
    )


def qwen3_8b_64x80gb() -> RunConfig:
    """Eight nodes."""
    base = qwen3_8b_32x80gb()
    return replace(base, name="qwen3_8b_64x80gb", layout=replace(base.layout, processes=64))


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
    return replace(
        qwen3_30b_a3b(),
        name="qwen3_30b_a3b_32x80gb",
        layout=LayoutConfig(tp=4, ep=8, sequence_parallel=True, processes=32),
    )


def qwen3_30b_a3b_64x80gb() -> RunConfig:
    """Eight nodes."""
    base = qwen3_30b_a3b_32x80gb()
    return replace(base, name="qwen3_30b_a3b_64x80gb", layout=replace(base.layout, processes=64))
