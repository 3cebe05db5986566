"""What a checkpoint of a student holds: the model under its global keys, the optimizer in one of two formats.

`reshardable` is Megatron's `fully_reshardable`: the first data-parallel rank gathers each parameter's master copy and
moments, whole; any layout loads them. `sharded` is Megatron's `dp_reshardable`: every rank writes its own part of the
gradient buffers as it lies there, with no communication and no copy; only the number of data- and context-parallel
ranks may change.
"""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica

from checkpoints_conversion.megatron_lm_args import args_of
from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import CheckpointFormat
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.model.hf_config import ARCHITECTURE, architecture_differences
from megatron_offgrpo.training.student import Student

_SHARDING_TYPE = {"sharded": "dp_reshardable", "reshardable": "fully_reshardable"}


def sharding(format: CheckpointFormat = "reshardable") -> dict[str, Any]:
    """Megatron's metadata for an optimizer format; made anew for each call, since Megatron adds groups to the dict."""
    # Without the second field every data-parallel rank would gather what the first one writes.
    return {
        "distrib_optim_sharding_type": _SHARDING_TYPE[format],
        "distrib_optim_fully_reshardable_mem_efficient": True,
        # With ep > 1 the experts have an optimizer of their own, without it they do not: their keys must be the same.
        "chained_optim_avoid_prefix": True,
    }


def saved_state(student: Student, iteration: int, format: CheckpointFormat) -> dict[str, Any]:
    """Everything a checkpoint holds; a collective of all ranks where the format is `reshardable`."""
    model = model_state(student)
    optimizer = optimizer_state(student, model, format, is_loading=False)
    for part in _parts(student, optimizer):
        # Empty where another rank gathers; what is not sharded must be the same on all ranks.
        if part["param_state"] is None:
            del part["param_state"]
    return {
        "model": model,
        "optimizer": optimizer,
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "args": args_of(student.architecture, student.models[0].config.params_dtype),
    }


def local_bytes(state: dict[str, Any]) -> int:
    """Bytes that this rank writes."""
    tensors = (value for value in nested_values(state) if isinstance(value, ShardedTensor))
    return sum(
        t.data.numel() * t.data.itemsize for t in tensors if is_main_replica(t.replica_id) and t.data is not None
    )


def model_state(student: Student) -> dict[str, Any]:
    """Sharded tensors of all chunks under their global keys.

    Without the layers' `_extra_state`: Transformer Engine's is a pickle, and holds nothing where fp8 has no history.
    """
    state: dict[str, Any] = {}
    for number, model in enumerate(student.models):
        chunk = model.sharded_state_dict(metadata=sharding())
        state |= {f"{number}.{key}": value for key, value in chunk.items() if not key.endswith("_extra_state")}
    return state


def fill_model(student: Student, loaded: dict[str, torch.Tensor]) -> None:
    """Copies a loaded `model_state` into the student's chunks."""
    for number, model in enumerate(student.models):
        prefix = f"{number}."
        chunk = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
        missing, unexpected = model.load_state_dict(chunk, strict=False)
        mismatched = [key for key in missing if not key.endswith("_extra_state")] + list(unexpected)
        assert not mismatched, mismatched


def optimizer_state(
    student: Student, model: dict[str, Any], format: CheckpointFormat, *, is_loading: bool
) -> dict[str, Any]:
    """The optimizer's state as Megatron shards it, without pickled objects.

    Args:
        model: `model_state(student)`.
    """
    state = student.optimizer.sharded_state_dict(model, metadata=sharding(format), is_loading=is_loading)
    for part in _parts(student, state):
        # In `dp_reshardable` Megatron pickles each rank's parameter groups, which are the same on all ranks, and the
        # lengths of its buckets, in whose place `layout_of` stands.
        part |= {key: value.data for key, value in part.items() if isinstance(value, ShardedObject)}
        for group in part["optimizer"]["param_groups"]:
            # Megatron's offloaded optimizer names classes here, which no checkpoint may.
            for key in [key for key, value in group.items() if isinstance(value, type)]:
                del group[key]
        if part["param_state"] is not None:
            part["param_state"].pop("per_bucket_numel", None)
            part["param_state"].pop("per_bucket_numel_unpadded", None)
    return state


def fill_optimizer(student: Student, own: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Loads moments, master weights and the step, whichever layout wrote them.

    With ep > 1 there are two optimizers in place of one, so parameter groups differ from layout to layout. Of those in
    the checkpoint only the step counts: the rest is the run's configuration.

    Args:
        own: `optimizer_state(student, ...)`, for loading.
        loaded: the same as it was loaded.
    """
    written = [part for part in (loaded, *loaded.values()) if isinstance(part, dict) and "optimizer" in part]
    groups = [group for part in written for group in part["optimizer"]["param_groups"]]
    (step,) = {int(group["step"]) for group in groups if "step" in group}
    filled = []
    for part, tensors in zip(_parts(student, own), _parts(student, loaded), strict=True):
        mine = [{**group, "step": step} for group in part["optimizer"]["param_groups"]]
        filled.append({**part, "optimizer": {"param_groups": mine}, "param_state": tensors["param_state"]})
    # Megatron's loader of the sharded format copies into the fp32 weights without this of its own.
    with torch.no_grad():
        student.optimizer.load_state_dict(filled if len(filled) > 1 else filled[0])


def _parts(student: Student, state: dict[Any, Any]) -> list[dict[str, Any]]:
    """The state of each of Megatron's chained optimizers, or of the only one."""
    count = len(student.optimizer.chained_optimizers)
    return [state[number] for number in range(count)] if count > 1 else [state]


def layout_of(student: Student) -> dict[str, int | None]:
    """What a sharded checkpoint must find again: the cut of the model, and of its gradient buffers."""
    config = student.models[0].config
    return {
        "tp": config.tensor_model_parallel_size,
        "pp": config.pipeline_model_parallel_size,
        "vpp": config.virtual_pipeline_model_parallel_size or 1,
        "ep": config.expert_model_parallel_size,
        "bucket_parameters": student.wrapped[0].ddp_config.bucket_size,
    }


def format_of(manifest: Manifest) -> CheckpointFormat:
    """The optimizer's format in a trained checkpoint."""
    found: CheckpointFormat = manifest.counts.get("format", "reshardable")
    return found


def require_loadable(student: Student, manifest: Manifest, checkpoint: Path, command: str) -> None:
    """Refuses a checkpoint of another architecture, and a sharded one that another layout wrote.

    Raises:
        CheckpointError: it lists the fields that differ; or says which layout wrote it, which is asked for, and the
            command that makes it reshardable.
    """
    recorded = manifest.counts.get(ARCHITECTURE)
    differing = architecture_differences(student.architecture, recorded) if recorded is not None else []
    if differing:
        raise CheckpointError(
            "config.json is not that of this checkpoint (config.json and checkpoint: " + "; ".join(differing) + ")",
            where=str(checkpoint),
            remedy="put the model's own config.json back, or choose another --set paths.output=FOLDER",
        )
    if format_of(manifest) == "reshardable":
        return
    written, wanted = manifest.counts["layout"], layout_of(student)
    if written == wanted:
        return
    options = [f"--set layout.{name}={value}" for name, value in manifest.config["layout"].items() if value is not None]
    raise CheckpointError(
        "this checkpoint is sharded, and another layout wrote it",
        where=str(checkpoint),
        expected=_described(written),
        got=_described(wanted),
        remedy=f"make it loadable in any layout: {command} --reshard "
        + " ".join(options)
        + ", then start this command again",
    )


def _described(layout: dict[str, int | None]) -> str:
    return " ".join(f"{name} {value}" for name, value in layout.items() if value is not None)
