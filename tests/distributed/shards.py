"""A student's parameters or gradients in the tests: written by each rank as they lie there, put together again whole.

Cut as Megatron's sharded state dict says. Much quicker than its checkpoints, which have tests of their own, and no copy
goes unseen: those that several ranks hold must be equal.
"""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, apply_factories

from megatron_offgrpo.training.checkpoint_state import sharding
from megatron_offgrpo.training.student import Student
from tests.distributed.toy import VOCAB_SIZE


def parameter_shards(student: Student) -> list[ShardedTensor]:
    """This rank's part of each parameter; what is copied into its data is in the model."""
    return _shards(student, {id(p): p.detach() for wrapped in student.wrapped for p in wrapped.parameters()})


def gradient_shards(student: Student) -> list[ShardedTensor]:
    """This rank's part of each gradient."""
    return _shards(student, {id(p): p.main_grad for wrapped in student.wrapped for p in wrapped.parameters()})


def _shards(student: Student, values: dict[int, torch.Tensor]) -> list[ShardedTensor]:
    found: list[ShardedTensor] = []
    for model in student.models:
        state = model.sharded_state_dict(metadata=sharding())
        parameters = [v for v in state.values() if isinstance(v, ShardedBase) and id(v.data) in values]
        assert {id(v.data) for v in parameters} == {id(p) for p in model.parameters()}, "every parameter is looked at"
        for value in parameters:
            value.data = values[id(value.data)]
        parts = dict(enumerate(parameters))
        apply_factories(parts)  # gate and up projection lie in one parameter
        found += nested_values(parts)
    return found


def write_shards(shards: list[ShardedTensor], folder: Path, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = [(shard.key, shard.global_shape, shard.global_slice(), shard.data) for shard in shards]
    torch.save(parts, folder / f"{rank}.pt")


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Whole tensors by global key from what all ranks have written; parts that none has written are NaN."""
    whole: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.pt")):
        for key, shape, where, data in torch.load(file, weights_only=False):
            if key not in whole:
                whole[key] = torch.full(shape, torch.nan)
            assert data.isfinite().all(), f"{key} in {file.name}"
            known = whole[key][where]
            assert known.isnan().all() or torch.equal(known, data), f"{key}: {file.name} holds another copy"
            known.copy_(data)
    return whole


def overlap(shard: ShardedTensor, whole: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A shard and its place in whole tensors of another layout, which may pad the vocabulary by fewer or more rows."""
    other = whole[shard.key][shard.global_slice()]
    assert shard.allow_shape_mismatch or other.shape == shard.data.shape, shard.key
    assert whole[shard.key].shape[0] >= VOCAB_SIZE or not shard.allow_shape_mismatch, shard.key
    common = tuple(slice(min(sizes)) for sizes in zip(shard.data.shape, other.shape, strict=True))
    return shard.data[common], other[common]


def fill(student: Student, folder: Path) -> None:
    """Takes the weights from `folder`, for the optimizer too."""
    whole = read_whole(folder)
    for shard in parameter_shards(student):
        mine, other = overlap(shard, whole)
        mine.copy_(other)
    student.optimizer.reload_model_params()
