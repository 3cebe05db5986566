"""Reads parts of the pieces of a torch_dist checkpoint, without loading a whole piece where a part is enough."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.utils import _create_file_view

from checkpoints_conversion.files import FilePool, bytes_of
from megatron_offgrpo.errors import CheckpointError

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Overlap:
    """What a stored piece and a wanted block have in common."""

    in_piece: Sizes
    in_target: Sizes
    lengths: Sizes

    @staticmethod
    def of(chunk: ChunkStorageMetadata, offsets: Sizes, sizes: Sizes) -> "Overlap | None":
        """Of a piece with the block at `offsets` of `sizes`; None where they do not touch."""
        starts = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
        ends = [min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Overlap(
            tuple(start - offset for start, offset in zip(starts, chunk.offsets, strict=True)),
            tuple(start - offset for start, offset in zip(starts, offsets, strict=True)),
            tuple(end - start for start, end in zip(starts, ends, strict=True)),
        )

    @property
    def numel(self) -> int:
        return torch.Size(self.lengths).numel()

    def run_in(self, piece: Sizes) -> int | None:
        """Index of the first element in the piece's memory if the common part is one run of it, else None."""
        inner = max((i for i, length in enumerate(self.lengths) if length != piece[i]), default=0)
        # Before the innermost cut dimension only single indices; after it everything.
        if any(length != 1 for length in self.lengths[:inner]):
            return None
        first, stride = 0, 1
        for offset, size in zip(reversed(self.in_piece), reversed(piece), strict=True):
            first, stride = first + offset * stride, stride * size
        return first


class PieceReader:
    """The stored pieces of one checkpoint folder."""

    def __init__(self, folder: Path, storage_data: dict[MetadataIndex, Any]) -> None:
        self.folder = folder
        self._storage = storage_data
        self._files = FilePool()
        self._places: dict[MetadataIndex, tuple[Path, int | None]] = {}

    def fill(self, target: Tensor, index: MetadataIndex, chunk: ChunkStorageMetadata, overlap: Overlap) -> None:
        """Copies the common part of a piece and the block into `target`, which is the block.

        Raises:
            CheckpointError: the piece is not what the metadata says.
        """
        piece = tuple(chunk.sizes)
        path, start = self._place(index, piece, target.dtype)
        slices = tuple(slice(o, o + n) for o, n in zip(overlap.in_target, overlap.lengths, strict=True))
        run = overlap.run_in(piece)
        if start is None or run is None:
            inside = tuple(slice(o, o + n) for o, n in zip(overlap.in_piece, overlap.lengths, strict=True))
            target[slices].copy_(self._whole(index, piece, target.dtype, path, start)[inside])
            return
        part = target[slices]
        direct = part if part.is_contiguous() else torch.empty(overlap.lengths, dtype=target.dtype)
        self._files.read(path, start + run * target.dtype.itemsize, bytes_of(direct))
        if direct is not part:
            part.copy_(direct)

    def _whole(self, index: MetadataIndex, piece: Sizes, dtype: torch.dtype, path: Path, start: int | None) -> Tensor:
        if start is None:
            return self._load(index, path, "cpu")
        whole = torch.empty(piece, dtype=dtype)
        self._files.read(path, start, bytes_of(whole))
        return whole

    def _place(self, index: MetadataIndex, piece: Sizes, dtype: torch.dtype) -> tuple[Path, int | None]:
        """File of a piece and offset of its first byte; no offset where the piece does not lie in order."""
        if index not in self._places:
            info = self._storage[index]
            path = self.folder / info.relative_path
            if getattr(info, "transform_descriptors", None):
                raise CheckpointError(f"{index.fqn} is stored compressed", where=str(path), expected="plain tensors")
            tensor = self._load(index, path, "meta")
            if tuple(tensor.shape) != piece or tensor.dtype != dtype:
                raise CheckpointError(
                    f"a piece of {index.fqn} is not what the metadata says",
                    where=str(path),
                    expected=f"{dtype} {list(piece)}",
                    got=f"{tensor.dtype} {list(tensor.shape)}",
                )
            start = None
            if tensor.is_contiguous() and tensor.storage_offset() == 0:
                # torch notes where in the archive the bytes begin when it loads without them.
                start = info.offset + tensor.untyped_storage()._checkpoint_offset
            self._places[index] = path, start
        return self._places[index]

    def _load(self, index: MetadataIndex, path: Path, device: str) -> Tensor:
        info = self._storage[index]
        try:
            with path.open("rb") as file:
                archive = _create_file_view(file, info.offset, info.length)
                tensor = torch.load(archive, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as cause:
            first_line = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
            raise CheckpointError(f"unreadable piece of {index.fqn} ({first_line})", where=str(path)) from None
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"a piece of {index.fqn} is no tensor", where=str(path), got=type(tensor).__name__)
        return tensor
