"""Reads the `.metadata` pickle of a torch_dist checkpoint through an allow-list: a checkpoint cannot run code."""

import argparse
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_offgrpo.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"
COMMON_OBJECT = MetadataIndex("common_state/shard_0_1")
"""Where Megatron-Core 0.19 keeps what used to be in common.pt: an object among the sharded tensors."""

# Megatron-LM keeps its arguments there, and Megatron-Core reads them with torch's own allow-list.
torch.serialization.add_safe_globals([argparse.Namespace])

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED: dict[str, frozenset[str]] = {
    _METADATA_MODULE: frozenset(
        {
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    # Megatron-Core stores the plan of every rank's write beside the index.
    "torch.distributed.checkpoint.planner": frozenset(
        {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"}
    ),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset({"Size", "device"}),
    "collections": frozenset({"OrderedDict"}),
    "builtins": frozenset({"set", "frozenset"}),
    # Written by Megatron-Core 0.15 and earlier; both are empty classes.
    "megatron.core.dist_checkpointing.strategies.torch": frozenset({"MCoreMetadata", "MCoreSavePlan"}),
    # The checkpoint's own path, in `storage_meta`.
    "pathlib": frozenset({"PosixPath", "PurePosixPath", "Path"}),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Python 3.13 pickles paths under the name of a module that no other version has.
        module = "pathlib" if module == "pathlib._local" else module
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed here")


def read_metadata(checkpoint: Path) -> Metadata:
    """The metadata of a torch_dist checkpoint folder.

    Raises:
        CheckpointError: there is none, it is truncated, or it names anything but metadata classes.
    """
    path = Path(checkpoint) / METADATA
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    except FileNotFoundError:
        raise CheckpointError("not a torch_dist checkpoint: no .metadata", where=str(checkpoint)) from None
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as cause:
        raise CheckpointError(
            f"refused or unreadable checkpoint metadata ({cause})",
            where=str(path),
            expected="a pickle of torch.distributed.checkpoint metadata and nothing else",
            remedy="use a checkpoint from a source you trust; nothing in it has been run",
        ) from None
    return metadata


def read_common(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors: Megatron's arguments, the iteration, the optimizer's settings.

    Tensors, plain values and an argparse namespace are all that it may hold.

    Raises:
        CheckpointError: there is none, or it cannot be read without running something.
    """
    path = Path(checkpoint) / COMMON
    try:
        source = path if path.exists() else _common_object(Path(checkpoint))
        common = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as cause:
        first_line = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise CheckpointError(f"refused or unreadable {COMMON} ({first_line})", where=str(path)) from None
    if not path.exists():
        (common,) = common  # one shard of one
    if not isinstance(common, dict):
        raise CheckpointError(f"unexpected content of {COMMON}", where=str(path), expected="dict", got=type(common))
    return common


def _common_object(checkpoint: Path) -> io.BytesIO:
    """The bytes of the object that stands in the place of common.pt."""
    place = (read_metadata(checkpoint).storage_data or {}).get(COMMON_OBJECT)
    if place is None:
        raise CheckpointError(
            "truncated checkpoint",
            where=str(checkpoint),
            expected=f"{COMMON}, or {COMMON_OBJECT.fqn} among its objects",
        )
    with (checkpoint / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return io.BytesIO(file.read(place.length))
