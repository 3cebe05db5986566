"""Keeps remarks of libraries about themselves off a user's terminal: what is named here; all else comes through."""

import logging
import os
import sys
import warnings
from collections.abc import Callable

WARNINGS = (
    # Transformer Engine and Apex are absent: `offgrpo doctor` says it once.
    {"module": r"megatron\.core"},
    # Megatron's use of torch: renamed collectives and shards, and gradients read where the CPU mode looks on.
    {"category": FutureWarning, "module": r"torch\.distributed"},
    {"category": FutureWarning, "message": r"Please use DTensor instead"},
    {"message": r"The \.grad attribute of a Tensor"},
)
LOGS = {
    # A CUDA toolkit without a GPU is no fault; Megatron imports the module that tells it.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # The layout of gradient buffers is Megatron's own default.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    # The other writer, nvidia-resiliency-ext 0.6, is not in the package index.
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""Name of a logger -> how the message begins."""
SAMPLING = {"eval", "generate", "check-weights"}


def keep_quiet() -> None:
    """Called once, before torch is imported."""
    for remark in WARNINGS:
        warnings.filterwarnings("ignore", **remark)
    for name, start in LOGS.items():
        logging.getLogger(name).addFilter(_without(start))
    if SAMPLING & set(sys.argv[1:2]):
        # vLLM on a CPU says in torch's C++ log, at each start, to which memory it binds itself.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def _without(start: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(start)
