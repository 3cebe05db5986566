"""What the processes of the checkpoint-format tests do: runs of the toy recipe that stop, go on and reshard."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_offgrpo.config import LayoutConfig, RunConfig, with_values
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training import loop
from megatron_offgrpo.training.reshard import reshard
from megatron_offgrpo.training.signals import StopRequest
from tests.distributed.toy import in_folder, toy_run


def run_of(folder: str | Path, output: str | Path, layout: dict | None = None, **sections: dict[str, Any]) -> RunConfig:
    """Four steps, saved after the second and the last; without KL, so that no reference is needed."""
    run = in_folder(toy_run(LayoutConfig(**(layout or {})), epochs=2), Path(folder))
    run = replace(run, paths=replace(run.paths, output=str(output)))
    return with_values(run, **{"objective": {"beta": 0.0}, "checkpoint": {"every_steps": 2, "keep": 0}, **sections})


def train(run: RunConfig, place: runtime.Placement, stop_after: int | None = None) -> bool:
    """Trains; as if a signal arrived during the given step of this start."""
    calls = iter(range(1, 1000))
    with mock.patch.object(StopRequest, "agreed", side_effect=lambda place: next(calls) == stop_after):
        return loop.train(run, place)


def do_all(actions: list[dict]) -> None:
    """Each action: where, in which layout, and either `reshard` or a training that may stop; then perhaps a copy."""
    for action in actions:
        form = {"every_steps": 2, "keep": 0, "format": action.get("form", "sharded")}
        run = run_of(action["folder"], action["output"], action["layout"], checkpoint=form)
        place = runtime.start(run.layout, seed=0)
        if action.get("reshard"):
            reshard(run, place)
        else:
            train(run, place, action.get("stop_after"))
        # Every rank has taken its own files away.
        dist.barrier()
        if "copy" in action and place.is_writer:
            shutil.copytree(action["output"], action["copy"])
        dist.barrier()
    runtime.stop()
