"""Turns the newest sharded checkpoint of a stopped run into one that any layout loads, without training."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_offgrpo.artifacts import read_manifest
from megatron_offgrpo.config import RunConfig
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.progress import say
from megatron_offgrpo.training.checkpoint import START_OVER, CheckpointWriter, load_all, newest_whole
from megatron_offgrpo.training.checkpoint_state import format_of
from megatron_offgrpo.training.inputs import open_inputs
from megatron_offgrpo.training.loop import CHECKPOINTS
from megatron_offgrpo.training.run_folder import open_run
from megatron_offgrpo.training.student import build_student
from megatron_offgrpo.training.watchdog import Watchdog


def reshard(run: RunConfig, place: Placement) -> None:
    """Loads the newest whole checkpoint in the layout that wrote it, and replaces it by a reshardable one.

    Raises:
        CheckpointError: there is none, it has damaged files, or another layout wrote it.
        ConfigError: the output folder holds another run.
    """
    inputs = open_inputs(run)
    output = Path(run.paths.output)
    if place.is_writer:
        open_run(output, inputs.manifest, start_over=run.command("train", "--force"))
    dist.barrier()
    with Watchdog(output, place.rank, run.fault.timeout_seconds) as watchdog:
        watchdog.alive("resharding")
        writer = CheckpointWriter(output / CHECKPOINTS, place, keep=0, asynchronous=False)
        newest = newest_whole(output / CHECKPOINTS, place, lambda text: say(f"train: {text}"))
        if newest is None:
            raise CheckpointError("no checkpoint of this run to reshard", where=str(output / CHECKPOINTS))
        manifest = read_manifest(newest, "checkpoint", remedy=START_OVER)
        done = f"{newest} loads in any layout"
        if format_of(manifest) == "sharded":
            student = build_student(inputs.architecture, run)
            rest = load_all(student, newest, run.command("train"))
            writer.save(student, int(rest["iteration"]), replace(manifest, counts={}), "reshardable")
        else:
            done += " already"
        if place.is_writer:
            say(f"train: {done}")
