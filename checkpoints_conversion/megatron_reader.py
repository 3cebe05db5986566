"""Reads regions of a Megatron torch_dist checkpoint, whatever layout wrote it."""

import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from checkpoints_conversion.megatron_writer import RELEASE, TRACKER
from checkpoints_conversion.piece_reader import Overlap, PieceReader
from checkpoints_conversion.planning import Region
from checkpoints_conversion.safe_metadata import METADATA, read_metadata
from megatron_offgrpo.artifacts import MANIFEST, Manifest, fingerprint_of_file, read_manifest
from megatron_offgrpo.errors import CheckpointError

# Where an optimizer keeps the fp32 master copy of a parameter: distributed (fully reshardable) or plain, and numbered
# where expert and other parameters have optimizers of their own.
_MASTER_PREFIX = re.compile(r"(chained_\d+\.)?optimizer\.state\.(param|fp32_param)\.")
# Master weights in the order of the gradient buffers of the layout that wrote them; (dtype of the model, of gradients).
_SHARDED_MASTERS = re.compile(r"(chained_\d+\.)?optimizer\.distributed\..*\.dtype_\(torch\.(?!float32,).*\.param$")


def iteration_folder(megatron_dir: Path, iteration: int | None = None) -> Path:
    """The folder of one iteration, by default the latest, of a Megatron-LM checkpoint folder.

    Raises:
        CheckpointError: no tracker file, or no such iteration.
    """
    megatron_dir = Path(megatron_dir)
    if iteration is not None:
        name = f"iter_{iteration:07d}"
    else:
        tracker = megatron_dir / TRACKER
        try:
            text = tracker.read_text(encoding="utf-8").strip()
        except OSError:
            raise CheckpointError(
                "not a Megatron checkpoint folder", where=str(megatron_dir), expected=TRACKER
            ) from None
        if text != RELEASE and not text.isdigit():
            raise CheckpointError(
                "unreadable tracker file", where=str(tracker), expected="a number or release", got=text
            )
        name = RELEASE if text == RELEASE else f"iter_{int(text):07d}"
    folder = megatron_dir / name
    if not folder.is_dir():
        there = sorted(path.name for path in megatron_dir.glob("iter_*")) or ["no iteration"]
        raise CheckpointError("no such iteration", where=str(megatron_dir), expected=name, got=", ".join(there))
    return folder


@dataclass(frozen=True)
class Stored:
    """Where a region lies in a checkpoint: part `part` of `num_parts` of the rows of `key`, under leading indices."""

    key: str
    region: Region
    leading: tuple[tuple[int, int], ...]
    """(index, number) for each leading dimension of the stored tensor."""
    part: int
    num_parts: int

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        rows, *columns = self.region.shape
        return (*(number for _, number in self.leading), rows * self.num_parts, *columns)

    @property
    def offsets(self) -> tuple[int, ...]:
        rows, *columns = self.region.shape
        return (*(index for index, _ in self.leading), rows * self.part, *(0 for _ in columns))

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*(1 for _ in self.leading), *self.region.shape)


class MegatronWeights:
    """The tensors of one iteration's folder.

    Raises:
        CheckpointError: no torch_dist checkpoint, refused metadata, or a data file that is missing or too short.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.metadata = read_metadata(self.folder)
        self._pieces = PieceReader(self.folder, self.metadata.storage_data)
        self._check_files()
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[tuple[int, ChunkStorageMetadata]]]] = {}

    def _check_files(self) -> None:
        needed: dict[str, int] = defaultdict(int)
        for info in self.metadata.storage_data.values():
            needed[info.relative_path] = max(needed[info.relative_path], info.offset + info.length)
        for name, size in needed.items():
            path = self.folder / name
            got = path.stat().st_size if path.is_file() else "no file"
            if not isinstance(got, int) or got < size:
                raise CheckpointError("truncated checkpoint", where=str(path), expected=f"{size} bytes", got=got)

    @cached_property
    def master_prefixes(self) -> tuple[str, ...]:
        """What stands before a parameter's key in that of its fp32 master copy; empty where there are none.

        Raises:
            CheckpointError: there are master weights, in a form that only the layout that wrote them can read.
        """
        found = {match[0] for key in self.tensors if (match := _MASTER_PREFIX.match(key))}
        if not found and any(_SHARDED_MASTERS.match(key) for key in self.tensors):
            raise CheckpointError(
                "the fp32 master weights of this checkpoint are sharded",
                where=str(self.folder),
                expected="the reshardable format",
                remedy="in the layout that wrote it: offgrpo train RECIPE --reshard; or export without --dtype fp32",
            )
        return tuple(sorted(found))

    def find(self, region: Region, prefix: str = "") -> Stored | None:
        """Where a region is stored, or None.

        Megatron stores the layers (and experts) of a model as one tensor with a leading dimension, or, where the layers
        differ, as one tensor per layer whose key carries the number; gate and up projection in one or, with
        `singleton_local_shards`, in two tensors.
        """
        for stacked in itertools.product((True, False), repeat=len(region.indices)):
            key, leading = prefix + region.pattern, []
            for (name, index, number), is_stacked in zip(region.indices, stacked, strict=True):
                key = key.replace(f".{{{name}}}", "" if is_stacked else f".{index}")
                if is_stacked:
                    leading.append((index, number))
            if key in self.tensors:
                return Stored(key, region, tuple(leading), region.part, region.num_parts)
            if region.num_parts == 2 and f"{key}_{'wv'[region.part]}" in self.tensors:
                return Stored(f"{key}_{'wv'[region.part]}", region, tuple(leading), 0, 1)
        return None

    def problem(self, region: Region, *, padded: bool, prefix: str = "") -> str | None:
        """Why a region cannot be read, or None.

        Args:
            padded: the stored tensor may have more rows than the model.
        """
        stored = self.find(region, prefix)
        if stored is None:
            return f"missing {prefix}{region.key}"
        got, expected, row = tuple(self.tensors[stored.key].size), stored.tensor_shape, len(stored.leading)
        if padded and len(got) == len(expected) and got[row] > expected[row]:
            expected = (*expected[:row], got[row], *expected[row + 1 :])
        return None if got == expected else f"wrong shape of {stored.key}: expected {list(expected)}, got {list(got)}"

    def dtype(self, region: Region) -> torch.dtype:
        """The dtype in which a region's tensor is stored."""
        stored = self.find(region)
        assert stored is not None, region
        dtype: torch.dtype = self.tensors[stored.key].properties.dtype
        return dtype

    @property
    def fingerprint(self) -> str:
        """That of the folder's manifest; of its metadata where something else wrote the checkpoint."""
        return self.manifest.fingerprint if self.manifest else fingerprint_of_file(self.folder / METADATA)

    @cached_property
    def manifest(self) -> Manifest | None:
        """The folder's manifest, if this project wrote it."""
        if not (self.folder / MANIFEST).exists():
            return None
        return read_manifest(self.folder, "checkpoint", remedy="convert or train again")

    def read(
        self,
        region: Region,
        prefix: str = "",
        first_row: int = 0,
        num_rows: int | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The content of a region, or some of its rows, put together from the stored pieces that overlap it.

        Args:
            out: memory for at least as many rows, or None for new memory.
        """
        stored = self.find(region, prefix)
        assert stored is not None, region
        rows, *columns = region.shape
        depth = len(stored.leading)
        sizes = (*(1 for _ in stored.leading), rows if num_rows is None else num_rows, *columns)
        offsets = (*stored.offsets[:depth], stored.offsets[depth] + first_row, *stored.offsets[depth + 1 :])
        if out is None:
            target = torch.empty(sizes, dtype=self.tensors[stored.key].properties.dtype)
        else:
            target = out[: sizes[depth]].view(sizes)
        covered = 0
        for number, chunk in self._candidates(stored):
            overlap = Overlap.of(chunk, offsets, sizes)
            if overlap is not None:
                self._pieces.fill(target, MetadataIndex(stored.key, chunk.offsets, number), chunk, overlap)
                covered += overlap.numel
        if covered != target.numel():
            raise CheckpointError(
                f"{stored.key} is incomplete", where=str(self.folder), expected=f"{target.numel()} values", got=covered
            )
        return target.reshape(-1, *columns)

    def _candidates(self, stored: Stored) -> list[tuple[int, ChunkStorageMetadata]]:
        """The pieces of a tensor that may hold these leading indices."""
        key, depth = stored.key, len(stored.leading)
        if (key, depth) not in self._chunks:
            by_leading: dict[tuple[int, ...], list[tuple[int, ChunkStorageMetadata]]] = defaultdict(list)
            for number, chunk in enumerate(self.tensors[key].chunks):
                ranges = [range(o, o + s) for o, s in zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)]
                for place in itertools.product(*ranges):
                    by_leading[place].append((number, chunk))
            self._chunks[key, depth] = by_leading
        return self._chunks[key, depth][stored.offsets[:depth]]
