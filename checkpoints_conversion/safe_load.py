"""Loads tensors of a torch_dist checkpoint into a model's shards as Megatron does, without running anything in it.

Megatron's own loader trusts a checkpoint twice: it reads `.metadata` as a plain pickle, and it unpickles the content of
every key that the metadata calls an object.
"""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as megatron
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from checkpoints_conversion.safe_metadata import read_common, read_metadata
from megatron_offgrpo.errors import CheckpointError


def load_tensors(state: dict[str, Any], checkpoint: Path, *, all_chunks: bool = True) -> dict[str, Any]:
    """`dist_checkpointing.load` of a state whose leaves are sharded tensors, with the rest of what it holds.

    Args:
        all_chunks: the state covers whole tensors over all ranks, which is checked; one chunk of several does not.

    Raises:
        CheckpointError: the metadata names anything but metadata, or a tensor is missing, of another shape, unreadable
            or stored as an object; on all ranks, whichever of them met it.
    """
    try:
        return _load(state, checkpoint, all_chunks)
    except (CheckpointException, CheckpointingException) as cause:
        failures = getattr(cause, "failures", {})
        # Of every rank: the exception and where it was raised.
        reason = next(iter(failures.values()))[0] if failures else cause
        if isinstance(reason, CheckpointError):
            raise reason from None
        first_line = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
        raise CheckpointError(f"does not fit the model ({first_line})", where=str(checkpoint)) from None


def _load(state: dict[str, Any], checkpoint: Path, all_chunks: bool) -> dict[str, Any]:
    # The body of `dist_checkpointing.load`, which reads the metadata of a checkpoint without common.pt by itself.
    sharded, own, factories = load_preprocess(state)
    loaded = merge(read_common(checkpoint), own)
    sharded, _ = extract_sharded_base(sharded)
    if all_chunks:
        validate_sharding_integrity(determine_global_metadata(sharded)[1])
    merge(loaded, _read_sharded(sharded, checkpoint))
    result: dict[str, Any] = apply_factory_merges(loaded, factories)
    return result


def _read_sharded(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    # The body of `TorchDistLoadShardedStrategy.load`, which names its reader and its planner.
    wanted = list(nested_values(sharded))
    by_key, flat_mapping, names = megatron._replace_state_dict_keys_with_sharded_keys(sharded)
    targets = megatron.mcore_to_pyt_state_dict(by_key, True)
    planner = _Planner(
        folder,
        shapes_validation_sharded_tensors=[t for t in wanted if not t.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in wanted if t.allow_shape_mismatch},
        flatten_state_dict=False,
        flatten_sharded_tensors=False,
    )
    dcp.load(targets, storage_reader=_Reader(folder), planner=planner)
    filled = {key: megatron._unwrap_pyt_sharded_tensor(value) for key, value in targets.items()}
    loaded: dict[str, Any] = megatron._replace_sharded_keys_with_state_dict_keys(filled, flat_mapping, names)
    megatron._restore_dict_types(loaded, sharded)
    return loaded


class _Reader(dcp.FileSystemReader):
    """Reads the metadata through the allow-list where it is used, and once.

    To look at the file before a plain reading is not enough: a pickle may set attributes of the allowed classes, and so
    name other things when it is read again.
    """

    _read: dcp.Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        if self._read is None:
            self._read = read_metadata(Path(self.path))
        return self._read


class _Planner(megatron.MCoreLoadPlanner):
    """Refuses what is not stored as a tensor; the metadata of an object can pose as that of a tensor."""

    def __init__(self, checkpoint: Path, **options: Any) -> None:
        super().__init__(**options)
        self._checkpoint = checkpoint

    def create_local_plan(self) -> dcp.LoadPlan:
        for key in self.state_dict:
            entry = self.metadata.state_dict_metadata.get(key)
            if type(entry) is not TensorStorageMetadata:
                raise self._refusal(key, "nothing" if entry is None else "a pickled object")
        return super().create_local_plan()

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise self._refusal(read_item.dest_index.fqn, "a pickled object")

    def _refusal(self, key: str, got: str) -> CheckpointError:
        return CheckpointError(
            f"{key} is not stored as a tensor",
            where=str(self._checkpoint),
            got=got,
            remedy="use a checkpoint of this model from a source you trust; nothing in this one has been run",
        )
