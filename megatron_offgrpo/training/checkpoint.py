"""Megatron checkpoints of a student: torch_dist folders laid out as Megatron-LM's."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from megatron_offgrpo.artifacts import Manifest, read_manifest, write_manifest
from megatron_offgrpo.config import CheckpointFormat
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.training.checkpoint_folder import (
    candidates,
    files_of,
    iteration_folder,
    remove_old,
    remove_unfinished,
    require_room,
    sha256_of,
    take_place,
    verified_manifest,
    write_tracker,
)
from megatron_offgrpo.training.checkpoint_state import (
    fill_model,
    format_of,
    layout_of,
    local_bytes,
    model_state,
    optimizer_state,
    require_loadable,
    saved_state,
)
from megatron_offgrpo.training.student import Student
from megatron_offgrpo.training.writer_process import start_writer_process

START_OVER = "offgrpo train with --force starts over"


def load_weights(student: Student, checkpoint: Path) -> None:
    """Fills the model, and the optimizer's fp32 master weights from it; for the start of a run."""
    state = {"model": model_state(student)}
    fill_model(student, dist_checkpointing.load(state, str(checkpoint))["model"])
    student.optimizer.reload_model_params()


def load_all(student: Student, checkpoint: Path) -> dict[str, Any]:
    """Fills model and optimizer, and returns the unsharded rest (iteration, ...); for a resumed run.

    Raises:
        CheckpointError: it is sharded, and another layout wrote it.
    """
    manifest = read_manifest(checkpoint, "checkpoint", remedy=START_OVER)
    require_loadable(student, manifest, checkpoint)
    model = model_state(student)
    state = {"model": model, "optimizer": optimizer_state(student, model, format_of(manifest), is_loading=True)}
    loaded = dist_checkpointing.load(state, str(checkpoint))
    fill_model(student, loaded.pop("model"))
    # 0.16.1's loader of the sharded format copies into the fp32 weights without this of its own.
    with torch.no_grad():
        student.optimizer.load_state_dict(loaded.pop("optimizer"))
    return loaded


def newest_whole(folder: Path, place: Placement, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written, or None where there is none; all ranks call it.

    Args:
        tell: called on the writer for each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    problem = None
    for checkpoint in candidates(folder):
        verify = partial(verified_manifest, checkpoint, START_OVER, part=place.rank, parts=place.world_size)
        try:
            _on_all_ranks(verify, place)
            return checkpoint
        except CheckpointError as cause:
            problem = cause
            if place.is_writer:
                tell(f"passed over a checkpoint: {cause}")
    if problem is not None:
        raise CheckpointError("no whole checkpoint is left", where=str(folder), got=str(problem), remedy=START_OVER)
    return None


class CheckpointWriter:
    """Writes a run's checkpoints, beside the training where `asynchronous`.

    A checkpoint is written into a hidden folder, gets its manifest with the checksums of its files, and is renamed when
    complete; the tracker moves last, then old checkpoints go. All ranks call every method, in the same order. After an
    error of `save`, `poll` or `finish` the checkpoints on disk are as before, and so is the student.
    """

    def __init__(self, folder: Path, place: Placement, *, keep: int, asynchronous: bool) -> None:
        self.folder, self.place, self.keep, self.asynchronous = folder, place, keep, asynchronous
        self.saved: int | None = None
        """Iteration of the newest complete checkpoint that this writer has written."""
        start_writer_process()
        self._queue = AsyncCallsQueue()
        self._pending: tuple[int, Path, Manifest] | None = None
        self._on_writer(lambda: remove_unfinished(folder))

    def save(
        self, student: Student, iteration: int, manifest: Manifest, format: CheckpointFormat = "reshardable"
    ) -> None:
        """Begins to write `iteration`, after what was begun before is complete.

        Args:
            manifest: what the checkpoint was made from; format, layout, lengths and checksums are added.

        Raises:
            CheckpointError: this save or the one before failed: no room, no permission, the folder has gone.
        """
        self.finish()
        state = saved_state(student, iteration, format)
        num_bytes = self._total(local_bytes(state))
        counts = {**manifest.counts, "iteration": iteration, "format": format, "layout": layout_of(student)}
        # A writer process that outlived a killed run may still be busy with the name of then.
        token = _on_all_ranks(time.time_ns, self.place)[0]
        temporary = self.folder / f".{iteration_folder(self.folder, iteration).name}.{token}.tmp"

        def prepare() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            require_room(self.folder, num_bytes)
            temporary.mkdir()

        self._on_writer(prepare)
        try:
            request = dist_checkpointing.save(state, str(temporary), async_sharded_save=self.asynchronous)
        except CheckpointException as cause:
            raise self._failed(cause, temporary) from cause
        self._pending = iteration, temporary, replace(manifest, counts=counts)
        if self.asynchronous:
            self._queue.schedule_async_request(request)
        else:
            self._complete()

    def poll(self) -> None:
        """Completes a save that all ranks have written; does not wait.

        Raises:
            CheckpointError: the save failed.
        """
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Waits until what was begun is complete.

        Raises:
            CheckpointError: the save failed.
        """
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        if self._pending is None:
            return
        try:
            done = self._queue.maybe_finalize_async_calls(blocking=blocking)
        except CheckpointException as cause:
            # The queue would hand the failed request out again.
            self._queue = AsyncCallsQueue()
            raise self._failed(cause, self._pending[1]) from cause
        if done:
            self._complete()

    def _complete(self) -> None:
        """Checksums, manifest, name, tracker."""
        assert self._pending is not None
        iteration, temporary, manifest = self._pending
        self._pending = None
        target = iteration_folder(self.folder, iteration)

        def digests_of_my_share() -> dict[str, str]:
            return {
                path.name: sha256_of(path) for path in files_of(temporary)[self.place.rank :: self.place.world_size]
            }

        digests = _on_all_ranks(digests_of_my_share, self.place)

        def name_it() -> None:
            counts = {
                **manifest.counts,
                "file_bytes": {path.name: path.stat().st_size for path in files_of(temporary)},
                "file_sha256": {name: digest for part in digests for name, digest in part.items()},
            }
            write_manifest(temporary, replace(manifest, counts=counts))
            take_place(temporary, target)
            write_tracker(self.folder, str(iteration))
            remove_old(self.folder, self.keep)

        self._on_writer(name_it)
        self.saved = iteration

    def _failed(self, cause: CheckpointException, temporary: Path) -> CheckpointError:
        self._pending = None
        if self.place.is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
        reasons = [str(failure[0] if isinstance(failure, tuple) else failure) for failure in cause.failures.values()]
        return CheckpointError(
            "a checkpoint could not be written" + (f" ({reasons[0]})" if reasons else ""),
            where=str(self.folder),
            remedy="the checkpoints before it are untouched; look at space, quota and permissions there",
        )

    def _on_writer(self, work: Callable[[], None]) -> None:
        _on_all_ranks(work if self.place.is_writer else lambda: None, self.place)

    def _total(self, num_bytes: int) -> int:
        total = torch.tensor(num_bytes, dtype=torch.int64, device=self.place.device)
        dist.all_reduce(total)
        return int(total)


def _on_all_ranks(work: Callable[[], Any], place: Placement) -> list[Any]:
    """Runs `work` on every rank and gathers what it returns; an error of one is raised on all, so that none waits.

    Raises:
        CheckpointError: the first rank's error.
    """
    result, problem = None, None
    try:
        result = work()
    except CheckpointError as cause:
        problem = cause
    except OSError as cause:
        problem = CheckpointError(
            f"{cause.strerror or cause}",
            where=str(cause.filename or "checkpoint"),
            remedy="older checkpoints are untouched; look at space, quota and permissions there",
        )
    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, (result, problem))
    for _, error in gathered:
        if error is not None:
            raise error
    return [result for result, _ in gathered]
