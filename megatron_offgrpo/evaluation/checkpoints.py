"""The checkpoints of a training run as models to evaluate, one after another, also while it trains."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from checkpoints_conversion import megatron_to_hf
from megatron_offgrpo.artifacts import MANIFEST, read_manifest
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.progress import say
from megatron_offgrpo.training.checkpoint_folder import iteration_folder

POLL_SECONDS = 5.0


def exported(checkpoints: Path, template: Path, output: Path, *, follow: bool) -> Iterator[tuple[str, Path]]:
    """Exports each checkpoint of a run, oldest first, and removes the export when the next one is asked for.

    A checkpoint that training removes before it is read (`checkpoint.keep`) is left out, and that is said.

    Args:
        checkpoints: RUN/train/checkpoints.
        template: Hugging Face folder that training began with.
        output: where the export is written.
        follow: wait for further checkpoints, until that of the plan's last step.

    Yields:
        Name of the checkpoint (iter_0000010) and its Hugging Face folder.

    Raises:
        CheckpointError: there is no checkpoint and none is waited for; one is damaged or of another model.
    """
    seen: set[str] = set()
    while True:
        # Before the look into the folder: what is saved in between is found in the next round.
        done = _last_checkpoint(checkpoints) in seen
        new = [path for path in sorted(checkpoints.glob("iter_*")) if path.name not in seen]
        if not new and not seen and not follow:
            raise CheckpointError("no checkpoint of a training run here", where=str(checkpoints), expected="iter_*")
        for path in new:
            seen.add(path.name)
            model = output / f"{path.name}_hf"
            try:
                if _export(path, template, model):
                    yield path.name, model
            finally:
                shutil.rmtree(model, ignore_errors=True)
        if done or (not new and not follow):
            return
        if not new:
            time.sleep(POLL_SECONDS)


def _last_checkpoint(checkpoints: Path) -> str | None:
    """Name of the checkpoint after the plan's last step; None before the run has begun."""
    if not (checkpoints.parent / MANIFEST).is_file():
        return None
    manifest = read_manifest(checkpoints.parent, "run", remedy="give the checkpoints of a training run")
    return iteration_folder(checkpoints, manifest.counts["steps"]).name


def _export(path: Path, template: Path, model: Path) -> bool:
    try:
        megatron_to_hf(path.parent, template, model, iteration=int(path.name.removeprefix("iter_")), overwrite=True)
    except (CheckpointError, OSError):
        if path.is_dir():
            raise
        say(f"{path}: training removed it before it could be evaluated; checkpoint.keep keeps more")
        return False
    return True
