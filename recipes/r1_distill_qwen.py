"""DeepSeek-R1-Distill-Qwen-32B with the released settings; with its optimizer it does not fit into eight 80 GB GPUs."""

from dataclasses import replace

from megatron_offgrpo.config import LayoutConfig, RunConfig
from recipes.openthinker3 import openthinker3_7b
from recipes.paths import run_paths
from recipes.sizes import OFFLOAD, on_80gb


def r1_distill_qwen_32b() -> RunConfig:
    """32 x 80 GB."""
    return replace(
        openthinker3_7b(),
        name="r1_distill_qwen_32b",
        paths=run_paths("r1_distill_qwen_32b", "DeepSeek-R1-Distill-Qwen-32B"),
        layout=LayoutConfig(tp=8, sequence_parallel=True, processes=32),
    )


def r1_distill_qwen_32b_8x80gb() -> RunConfig:
    """8 x 80 GB, the optimizer in the node's memory (offload has not run on a GPU).

    It takes 366 GiB for the states, 122 for gradients on their way, and 366 more while a checkpoint is gathered.
    """
    return on_80gb(r1_distill_qwen_32b(), 8, **OFFLOAD)


def r1_distill_qwen_32b_64x80gb() -> RunConfig:
    """Eight nodes."""
    return on_80gb(r1_distill_qwen_32b(), 64)
