"""Megatron's asynchronous save of one checkpoint, in which what fails on one rank fails on all.

Megatron lets rank 0 alone write common.pt, .metadata and metadata.json: an error there would leave the others waiting.
"""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from checkpoints_conversion.safe_metadata import COMMON
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.parallel.runtime import Placement

REMEDY = "older checkpoints are untouched; look at space, quota and permissions there"


def on_all_ranks(work: Callable[[], Any], place: Placement) -> list[Any]:
    """Runs `work` on every rank and gathers what it returns; an error of one is raised on all, so that none waits.

    Raises:
        CheckpointError: the first rank's error.
    """
    result, problem = None, None
    try:
        result = work()
    except CheckpointError as cause:
        problem = cause
    except OSError as cause:
        problem = CheckpointError(
            f"{cause.strerror or cause}", where=str(cause.filename or "checkpoint"), remedy=REMEDY
        )
    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, (result, problem))
    for _, error in gathered:
        if error is not None:
            raise error
    return [result for result, _ in gathered]


def on_writer(work: Callable[[], None], place: Placement) -> None:
    """Runs `work` on the writer alone; its error is raised on all ranks."""
    on_all_ranks(work if place.is_writer else lambda: None, place)


def save_common(common: dict[str, Any], folder: Path, place: Placement) -> None:
    """Writes what a checkpoint holds beside its tensors; every Megatron-Core up to 0.19 reads it from this file."""
    if place.is_writer:
        torch.save(common, folder / COMMON)


def begin_writing(state: dict[str, Any], folder: Path, place: Placement) -> AsyncRequest:
    """`dist_checkpointing.save` into an empty folder; the request is the caller's to schedule and to finalize.

    Raises:
        CheckpointError: common.pt could not be written, or a rank does not see the folder.
    """
    sharded, common = save_preprocess(state)

    def write_common() -> None:
        folder.stat()  # on every rank: Megatron would make one of its own where it is missing
        try:
            save_common(common, folder, place)
        except RuntimeError as cause:  # torch says so where its file writer fails
            raise CheckpointError(
                f"could not be written ({cause})", where=str(folder / COMMON), remedy=REMEDY
            ) from cause

    on_all_ranks(write_common, place)
    return _SaveStrategy(place).async_save(sharded, folder, async_strategy="mcore")


class _SaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron's, but the two files that rank 0 alone writes at the end are written where all ranks learn of an error.

    Finalizing raises Megatron's CheckpointException where a rank's writers failed, CheckpointError for these two.
    """

    def __init__(self, place: Placement) -> None:
        super().__init__("torch_dist", 1)
        self.place = place

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, strategy: str) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, strategy)
        write_metadata = writer.finish
        put_off: list[Callable[[], None]] = []
        # Megatron calls it on rank 0, while the others wait to hear of failed writers.
        writer.finish = lambda *arguments: put_off.append(partial(write_metadata, *arguments))

        def write_last_files() -> None:
            for write in put_off:
                write()
            save_config(CheckpointingConfig(self.backend, self.version), str(writer.checkpoint_dir))

        request.add_finalize_fn(lambda: on_writer(write_last_files, self.place))
        return request
