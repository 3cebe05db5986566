"""A recipe on another number of GPUs of 80 GB."""

from dataclasses import replace
from typing import Any

from megatron_offgrpo.config import RunConfig, with_values

# While a save is written beside the training, each page that a step changes exists twice in the host's memory.
OFFLOAD: dict[str, dict[str, Any]] = {
    "optimizer": {"cpu_offload": True},
    "checkpoint": {"format": "reshardable", "asynchronous": False},
}
"""The optimizer in the host's memory: 12 bytes a parameter for its states, 4 for the gradients on their way, and 12
more while a checkpoint is gathered. It has not run on a GPU."""


def on_80gb(run: RunConfig, num_gpus: int, **sections: dict[str, Any]) -> RunConfig:
    """`run` on so many GPUs, which its name then says, with further fields of its sections replaced."""
    layout = {"processes": num_gpus, **sections.pop("layout", {})}
    return replace(with_values(run, layout=layout, **sections), name=f"{run.name}_{num_gpus}x80gb")
