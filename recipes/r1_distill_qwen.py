"""DeepSeek-R1-Distill-Qwen-32B with the released settings; its states need more than eight 80 GB GPUs."""

from dataclasses import replace

from megatron_offgrpo.config import LayoutConfig, RunConfig
from recipes.openthinker3 import openthinker3_7b
from recipes.paths import run_paths


def r1_distill_qwen_32b() -> RunConfig:
    """32 x 80 GB."""
    return replace(
        openthinker3_7b(),
        name="r1_distill_qwen_32b",
        paths=run_paths("r1_distill_qwen_32b", "DeepSeek-R1-Distill-Qwen-32B"),
        layout=LayoutConfig(tp=8, sequence_parallel=True, processes=32),
    )


def r1_distill_qwen_32b_64x80gb() -> RunConfig:
    """Eight nodes."""
    base = r1_distill_qwen_32b()
    return replace(base, name="r1_distill_qwen_32b_64x80gb", layout=replace(base.layout, processes=64))
