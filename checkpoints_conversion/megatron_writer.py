"""Writes a Megatron torch_dist checkpoint in any order and in small blocks, without a process group.

torch's own writer holds whole tensors, and computes checksums that nothing reads. Here the data file is laid out first:
each piece is the archive that `torch.save` makes of a tensor of its shape, with the space of the tensor's bytes left
free. The bytes are put in place afterwards.
"""

import io
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import skip_data

from checkpoints_conversion.files import FilePool, bytes_of
from checkpoints_conversion.planning import Layout, Region
from checkpoints_conversion.safe_metadata import COMMON

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
DATA_FILE = "__0_0.distcp"
_ALIGNMENT = 64


@dataclass(frozen=True)
class _Archive:
    """What `torch.save` writes around the bytes of a tensor of one shape and dtype."""

    before: bytes
    after: bytes
    num_bytes: int

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> "_Archive":
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        with tempfile.TemporaryFile(dir=folder) as file:
            with skip_data():
                # Memory that is never touched, and a hole in a file: neither costs space.
                torch.save(torch.empty(shape, dtype=dtype), file)
            file.flush()
            file.seek(0)
            start = torch._C.PyTorchFileReader(file).get_record_offset("data/0")
            file.seek(0)
            before = file.read(start)
            file.seek(start + num_bytes)
            return _Archive(before, file.read(), num_bytes)


class _MetadataWriter(FileSystemWriter):
    """Names its folder as a text, as Megatron's own does: a path of Python 3.13 is read by no other version."""

    @property
    def checkpoint_id(self) -> str:
        return str(self.path)


class TorchDistWriter:
    """The files of a torch_dist checkpoint folder."""

    def __init__(self, folder: Path, pieces: Iterable[tuple[Region, torch.dtype]], extra_states: Iterable[str]) -> None:
        self._folder = folder
        self._path = folder / DATA_FILE
        self._path.touch()
        self._files = FilePool("r+b")
        self._start: dict[Region, int] = {}
        self._left: dict[Region, int] = {}
        self._metadata = Metadata(state_dict_metadata={})
        self._results: list[WriteResult] = []
        archives: dict[tuple[tuple[int, ...], torch.dtype], _Archive] = {}
        end = 0
        for region, dtype in pieces:
            if (region.sizes, dtype) not in archives:
                archives[region.sizes, dtype] = _Archive.of(region.sizes, dtype, folder)
            end = self._lay_out(region, dtype, archives[region.sizes, dtype], -(-end // _ALIGNMENT) * _ALIGNMENT)
        self._lay_out_extra_states(extra_states, end)

    def _lay_out(self, region: Region, dtype: torch.dtype, archive: _Archive, offset: int) -> int:
        """Places one piece at `offset` and returns where it ends."""
        start = offset + len(archive.before)
        self._files.write(self._path, offset, memoryview(archive.before))
        self._files.write(self._path, start + archive.num_bytes, memoryview(archive.after))
        self._start[region], self._left[region] = start, archive.num_bytes
        length = len(archive.before) + archive.num_bytes + len(archive.after)
        entry = self._metadata.state_dict_metadata.setdefault(
            region.key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(region.global_shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        index = MetadataIndex(region.key, torch.Size(region.offsets), len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes)))
        self._results.append(WriteResult(index, length, _StorageInfo(DATA_FILE, offset, length)))
        return offset + length

    def _lay_out_extra_states(self, keys: Iterable[str], offset: int) -> None:
        """One stored object for all of them: as Megatron-Core writes it, the list of a process's parts, here empty."""
        stream = io.BytesIO()
        torch.save([None], stream)
        content = stream.getbuffer()
        self._files.write(self._path, offset, content)
        for key in keys:
            self._metadata.state_dict_metadata[key] = BytesStorageMetadata()
            info = _StorageInfo(DATA_FILE, offset, len(content))
            self._results.append(WriteResult(MetadataIndex(key), len(content), info))

    def write(self, region: Region, rows: Tensor, first_row: int = 0) -> None:
        """Puts rows `first_row` onwards of a region in their place."""
        row_bytes = torch.Size(region.shape[1:]).numel() * rows.dtype.itemsize
        content = bytes_of(rows)
        self._files.write(self._path, self._start[region] + first_row * row_bytes, content)
        self._left[region] -= len(content)

    def close(self, common: dict[str, Any]) -> None:
        """Flushes the data to disk and writes the files that make the folder a checkpoint; every row must be there."""
        unfinished = [region for region, left in self._left.items() if left]
        assert not unfinished, f"never written: {unfinished[:3]}"
        self._files.close(sync=True)
        torch.save(common, self._folder / COMMON)
        _MetadataWriter(self._folder).finish(self._metadata, [self._results])
        config = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        (self._folder / "metadata.json").write_text(json.dumps(config), encoding="utf-8")


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
