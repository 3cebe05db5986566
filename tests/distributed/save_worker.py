"""What the processes of the tests of failing saves do."""

import errno
import os
import queue
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

from megatron_offgrpo.artifacts import Manifest
from megatron_offgrpo.config import LayoutConfig
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.parallel import runtime
from megatron_offgrpo.training import checkpoint, checkpoint_write
from megatron_offgrpo.training.checkpoint import CheckpointWriter
from tests.distributed.fault_worker import run_in, student_after_a_step

WRITES_OF_ONE_RANK: dict[str, tuple[object, str]] = {
    "common.pt": (checkpoint_write, "save_common"),
    "fork": (async_utils.TemporalAsyncCaller, "schedule_async_call"),
    ".metadata": (filesystem_async.FileSystemWriterAsync, "finish"),
    "metadata.json": (checkpoint_write, "save_config"),
    "manifest.json": (checkpoint, "write_manifest"),
}
"""What a save does on rank 0 alone, or may fail to do on it alone, by the file."""


def fail_once(patch: Callable[..., None], name: str, error: Exception | None = None) -> None:
    """The first such write of this process fails, by default as on a full disk."""
    owner, function = WRITES_OF_ONE_RANK[name]
    real, calls = getattr(owner, function), []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 1:
            raise error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return real(*arguments, **keywords)

    patch(owner, function, failing)


def fail_on_rank_0(folder: str, output: str) -> None:
    """For each write: where it fails on rank 0, all get one error and nothing is left; the next save goes well."""
    run = run_in(folder, output)
    place = runtime.start(LayoutConfig(), seed=0)
    student = student_after_a_step(run)
    checkpoints = Path(output) / "checkpoints"
    manifest = Manifest(kind="checkpoint", fingerprint="test", inputs={})
    writer = CheckpointWriter(checkpoints, place, keep=1, asynchronous=True)

    def save(iteration: int) -> None:
        writer.save(student, iteration, manifest, "sharded")  # of which every rank writes a part
        writer.finish()

    # What torch makes of a full disk there.
    cases: list[tuple[str, Exception | None]] = [("common.pt", RuntimeError("PytorchStreamWriter failed writing file"))]
    cases += [(name, None) for name in WRITES_OF_ONE_RANK]
    for iteration, (name, error) in enumerate(cases, 1):
        with pytest.MonkeyPatch.context() as patch:
            if place.rank == 0:
                fail_once(patch.setattr, name, error)
            with pytest.raises(CheckpointError, match="No space left on device" if error is None else "failed writing"):
                save(iteration)
        with pytest.raises(queue.Empty):
            filesystem_async._results_queue.get_nowait()
        if place.is_writer:
            assert list(checkpoints.glob(".iter*")) == [], name
        save(iteration)
        assert checkpoint.newest_whole(checkpoints, place, print).name == f"iter_{iteration:07d}", name
    runtime.stop()
