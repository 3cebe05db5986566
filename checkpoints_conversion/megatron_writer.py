"""Writes a Megatron torch_dist checkpoint one tensor at a time, without a process group."""

import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from checkpoints_conversion.planning import Layout, Region
from checkpoints_conversion.safe_metadata import COMMON
from megatron_offgrpo.errors import OffgrpoError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


@dataclass(frozen=True)
class LazyPiece:
    """A region and how to make its content when its turn comes."""

    region: Region
    dtype: torch.dtype
    load: Callable[[], Tensor]


def extra_state_keys(layout: Layout) -> tuple[str, ...]:
    """Keys of the empty `_extra_state` objects that Transformer Engine's modules ask for when they load.

    Transformer Engine keeps the scales of fp8 training there; without them, Megatron-LM would refuse the checkpoint
    unless told to be lenient. One per module and layer (and expert): KEY/shard_OFFSETS_SHAPE.
    """
    keys: dict[str, None] = {}
    for move in layout.moves:
        module = move.region.key.rpartition(".")[0]
        if module.startswith("embedding.") or module == "output_layer" or module.endswith(".router"):
            continue
        offsets = ".".join(str(index) for _, index, _ in move.region.indices) or "0"
        shape = ".".join(str(number) for _, _, number in move.region.indices) or "1"
        modules = [module]
        if module.endswith(".linear_qkv"):
            modules.append(module.removesuffix("linear_qkv") + "core_attention")
        keys |= {f"{name}._extra_state/shard_{offsets}_{shape}": None for name in modules}
    return tuple(keys)


class _LazySavePlanner(DefaultSavePlanner):
    """Plans from shapes alone and makes each tensor at the moment it is written."""

    def __init__(self, pieces: Sequence[LazyPiece], extra_states: Sequence[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=False)
        self.pieces = {MetadataIndex(p.region.key, torch.Size(p.region.offsets)): p for p in pieces}
        self.extra_states = extra_states

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, piece in self.pieces.items():
            chunk = ChunkStorageMetadata(offsets=torch.Size(piece.region.offsets), sizes=torch.Size(piece.region.sizes))
            data = TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(piece.region.global_shape))
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        for key in self.extra_states:
            items.append(WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            # As Megatron-Core writes a sharded object: the list of this process's parts of it.
            empty = io.BytesIO()
            torch.save([None], empty)
            return empty
        piece = self.pieces[write_item.index]
        tensor = piece.load()
        assert tensor.dtype == piece.dtype, (write_item.index, tensor.dtype, piece.dtype)
        return tensor.reshape(piece.region.sizes).contiguous()


def write_torch_dist(
    folder: Path, pieces: Sequence[LazyPiece], extra_states: Sequence[str], common: dict[str, Any]
) -> None:
    """Writes the files of a torch_dist checkpoint: data, .metadata, common.pt and metadata.json."""
    torch.save(common, folder / COMMON)
    # One thread and nothing copied ahead: one group of tensors in memory at a time.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    try:
        with warnings.catch_warnings():
            # It says that there is no process group, which is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            dcp.save({}, storage_writer=writer, planner=_LazySavePlanner(pieces, extra_states), no_dist=True)
    except CheckpointException as wrapped:
        cause, _ = next(iter(wrapped.failures.values()))
        if isinstance(cause, OffgrpoError | OSError):
            raise cause from None
        raise
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(config), encoding="utf-8")
