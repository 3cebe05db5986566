"""Writes a Megatron torch_dist checkpoint one tensor at a time, without a process group."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from checkpoints_conversion.planning import Region
from checkpoints_conversion.safe_metadata import COMMON

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


@dataclass(frozen=True)
class LazyPiece:
    """A region and how to make its content when its turn comes."""

    region: Region
    dtype: torch.dtype
    load: Callable[[], Tensor]


class _LazySavePlanner(DefaultSavePlanner):
    """Plans from shapes alone and makes each tensor at the moment it is written."""

    def __init__(self, pieces: Sequence[LazyPiece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=False)
        self.pieces = {MetadataIndex(p.region.key, torch.Size(p.region.offsets)): p for p in pieces}

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, piece in self.pieces.items():
            chunk = ChunkStorageMetadata(offsets=torch.Size(piece.region.offsets), sizes=torch.Size(piece.region.sizes))
            data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.region.global_shape))
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        piece = self.pieces[write_item.index]
        tensor = piece.load()
        assert tensor.dtype == piece.dtype, (write_item.index, tensor.dtype, piece.dtype)
        return tensor.reshape(piece.region.sizes).contiguous()


def write_torch_dist(folder: Path, pieces: Sequence[LazyPiece], common: dict[str, Any]) -> None:
    """Writes the files of a torch_dist checkpoint: data, .metadata, common.pt and metadata.json."""
    torch.save(common, folder / COMMON)
    # One thread and nothing copied ahead: one group of tensors in memory at a time.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    dcp.save({}, storage_writer=writer, planner=_LazySavePlanner(pieces), no_dist=True)
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
