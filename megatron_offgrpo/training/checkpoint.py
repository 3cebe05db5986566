"""Megatron checkpoints: torch_dist folders laid out as Megatron-LM's, loadable in any layout.

FOLDER/latest_checkpointed_iteration.txt    "release" (converted weights) or the iteration
FOLDER/iter_0000010/                        .metadata, *.distcp, common.pt, metadata.json, manifest.json
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from checkpoints_conversion.megatron_lm_args import args_of
from checkpoints_conversion.safe_metadata import read_common, read_metadata
from megatron_offgrpo.artifacts import MANIFEST, Manifest, read_manifest, write_manifest
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.training.student import Student

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def sharding() -> dict[str, str]:
    """Megatron's metadata for 0.16's optimizer format that loads in any layout; Megatron adds groups to the dict."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def iteration_folder(folder: Path, iteration: int | None) -> Path:
    """The folder of one checkpoint; None is the converted, untrained one."""
    return folder / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint in `folder`, or None where there is no checkpoint.

    Raises:
        CheckpointError: the tracker names a checkpoint that is not there.
    """
    tracker = Path(folder) / TRACKER
    if not tracker.exists():
        return None
    name = tracker.read_text(encoding="utf-8").strip()
    if name != RELEASE and not name.isdigit():
        raise CheckpointError("not an iteration", where=str(tracker), expected="a number or 'release'", got=name)
    found = iteration_folder(Path(folder), None if name == RELEASE else int(name))
    if not found.is_dir():
        raise CheckpointError(
            "the newest checkpoint is missing",
            where=str(tracker),
            expected=str(found),
            remedy="write the number of a checkpoint that exists into this file",
        )
    return found


def require_latest(folder: str | Path) -> tuple[Path, Manifest]:
    """The newest checkpoint in `folder` and its manifest, with its files checked against it.

    Raises:
        CheckpointError: none there, or a file is missing or has another size than when it was written.
    """
    remedy = f"offgrpo convert hf-to-megatron --hf HF_DIR --megatron {folder}"
    checkpoint = latest(Path(folder))
    if checkpoint is None:
        raise CheckpointError("no checkpoint here", where=str(folder), expected=TRACKER, remedy=remedy)
    return checkpoint, verified_manifest(checkpoint, remedy)


def verified_manifest(checkpoint: Path, remedy: str) -> Manifest:
    """The checkpoint's manifest, after its files were found as long as they were written."""
    manifest = read_manifest(checkpoint, "checkpoint", remedy=remedy)
    for name, size in manifest.counts.get("file_bytes", {}).items():
        path = checkpoint / name
        got = path.stat().st_size if path.exists() else None
        if got != size:
            raise CheckpointError(
                "truncated checkpoint",
                where=str(path),
                expected=f"{size} bytes",
                got="no file" if got is None else f"{got} bytes",
                remedy=f"delete {checkpoint} and use an older checkpoint, or: {remedy}",
            )
    # Both are pickles: what they may hold is checked before Megatron reads them.
    read_metadata(checkpoint)
    read_common(checkpoint)
    return manifest


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Name -> bytes of every file of a checkpoint but its manifest."""
    return {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST}


def load_weights(student: Student, checkpoint: Path) -> None:
    """Fills the model, and the optimizer's fp32 master weights from it; for the start of a run."""
    state = {"model": _model_state(student)}
    _fill_model(student, dist_checkpointing.load(state, str(checkpoint))["model"])
    student.optimizer.reload_model_params()


def load_all(student: Student, checkpoint: Path) -> dict[str, Any]:
    """Fills model and optimizer, and returns the unsharded rest (iteration, ...); for a resumed run."""
    model_state = _model_state(student)
    state = {
        "model": model_state,
        "optimizer": student.optimizer.sharded_state_dict(model_state, metadata=sharding(), is_loading=True),
    }
    loaded = dist_checkpointing.load(state, str(checkpoint))
    _fill_model(student, loaded.pop("model"))
    student.optimizer.load_state_dict(loaded.pop("optimizer"))
    return loaded


def save(student: Student, folder: Path, iteration: int, manifest: Manifest, keep: int) -> None:
    """Writes the checkpoint of `iteration`; all ranks call it.

    Written into a hidden folder that is renamed when complete; the tracker moves last, then old checkpoints go.
    """
    target = iteration_folder(folder, iteration)
    temporary = folder / f".{target.name}.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    model_state = _model_state(student)
    state = {
        "model": model_state,
        "optimizer": student.optimizer.sharded_state_dict(model_state, metadata=sharding()),
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "args": args_of(student.architecture, student.models[0].config.params_dtype),
    }
    dist_checkpointing.save(state, str(temporary))
    dist.barrier()
    if dist.get_rank() == 0:
        counts = {**manifest.counts, "iteration": iteration, "file_bytes": file_sizes(temporary)}
        write_manifest(temporary, Manifest(**{**vars(manifest), "counts": counts}))
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        write_tracker(folder, str(iteration))
        _remove_old(folder, keep)
    dist.barrier()


def write_tracker(folder: Path, content: str) -> None:
    """Points the folder at its newest checkpoint, atomically."""
    temporary = folder / f".{TRACKER}.tmp"
    temporary.write_text(content + "\n", encoding="utf-8")
    os.replace(temporary, folder / TRACKER)


def _remove_old(folder: Path, keep: int) -> None:
    if keep:
        for old in sorted(folder.glob("iter_*"))[:-keep]:
            shutil.rmtree(old)


def _model_state(student: Student) -> dict[str, Any]:
    """Sharded tensors of all chunks under their global keys, without the layers' empty `_extra_state` objects."""
    state: dict[str, Any] = {}
    for number, model in enumerate(student.models):
        chunk = model.sharded_state_dict(metadata=sharding())
        state |= {f"{number}.{key}": value for key, value in chunk.items() if not key.endswith("_extra_state")}
    return state


def _fill_model(student: Student, loaded: dict[str, torch.Tensor]) -> None:
    for number, model in enumerate(student.models):
        prefix = f"{number}."
        chunk = {key.removeprefix(prefix): value for key, value in loaded.items() if key.startswith(prefix)}
        missing, unexpected = model.load_state_dict(chunk, strict=False)
        mismatched = [key for key in missing if not key.endswith("_extra_state")] + list(unexpected)
        assert not mismatched, mismatched
