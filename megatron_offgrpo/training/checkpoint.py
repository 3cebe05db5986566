"""Megatron checkpoints of a student: torch_dist folders laid out as Megatron-LM's."""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from checkpoints_conversion.safe_load import load_tensors
from megatron_offgrpo.artifacts import Manifest, read_manifest, write_manifest
from megatron_offgrpo.config import CheckpointFormat
from megatron_offgrpo.errors import CheckpointError
from megatron_offgrpo.model.hf_config import ARCHITECTURE
from megatron_offgrpo.parallel.runtime import Placement
from megatron_offgrpo.training.checkpoint_folder import (
    best_up_to,
    candidates,
    files_of,
    iteration_folder,
    remove_old,
    remove_unfinished,
    require_folder,
    require_room,
    sha256_of,
    take_place,
    verified_manifest,
    write_best,
    write_tracker,
)
from megatron_offgrpo.training.checkpoint_state import (
    fill_model,
    fill_optimizer,
    format_of,
    layout_of,
    local_bytes,
    model_state,
    optimizer_state,
    require_loadable,
    saved_state,
)
from megatron_offgrpo.training.checkpoint_write import REMEDY, begin_writing, on_all_ranks, on_writer
from megatron_offgrpo.training.student import Student
from megatron_offgrpo.training.write_results import write_results

START_OVER = "offgrpo train with --force starts over"


def load_weights(student: Student, checkpoint: Path) -> None:
    """Fills the model, and the optimizer's fp32 master weights from it; for the start of a run.

    Raises:
        CheckpointError: it does not hold this model, or holds something other than tensors in its place.
    """
    state = {"model": model_state(student)}
    fill_model(student, load_tensors(state, checkpoint)["model"])
    student.optimizer.reload_model_params()


def load_all(student: Student, checkpoint: Path, command: str = "offgrpo train RECIPE") -> dict[str, Any]:
    """Fills model and optimizer, and returns the unsharded rest (iteration, ...); for a resumed run.

    Args:
        command: what was typed to train, for the remedy.

    Raises:
        CheckpointError: it is sharded, and another layout wrote it; or as for `load_weights`.
    """
    manifest = read_manifest(checkpoint, "checkpoint", remedy=START_OVER)
    require_loadable(student, manifest, checkpoint, command)
    model = model_state(student)
    optimizer = optimizer_state(student, model, format_of(manifest), is_loading=True)
    loaded = load_tensors({"model": model, "optimizer": optimizer}, checkpoint)
    fill_model(student, loaded.pop("model"))
    fill_optimizer(student, optimizer, loaded.pop("optimizer"))
    return loaded


def newest_whole(folder: Path, place: Placement, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are as they were written, or None where there is none; all ranks call it.

    A tracker that is missing or names none is mended.

    Args:
        tell: called on the writer for each damaged checkpoint that is passed over, and for a tracker that is mended.

    Raises:
        CheckpointError: there are or were checkpoints, and none is whole.
    """
    # Only the writer looks: on a network file system ranks may see different names, and would wait for each other.
    found, tracker_problem = on_all_ranks(partial(candidates, folder) if place.is_writer else lambda: None, place)[0]
    problem = tracker_problem
    for checkpoint in found:
        verify = partial(verified_manifest, checkpoint, START_OVER, part=place.rank, parts=place.world_size)
        try:
            on_all_ranks(verify, place)
        except CheckpointError as cause:
            problem = str(cause)
            if place.is_writer:
                tell(f"passed over a checkpoint: {cause}")
            continue
        if tracker_problem is not None and place.is_writer:
            tell(f"{tracker_problem}; the newest whole checkpoint is {checkpoint.name}")
        if tracker_problem is not None:
            number = int(checkpoint.name.removeprefix("iter_"))
            on_all_ranks(partial(write_tracker, folder, str(number)) if place.is_writer else lambda: None, place)
        return checkpoint
    if problem is not None:
        raise CheckpointError("no whole checkpoint is left", where=str(folder), got=problem, remedy=START_OVER)
    return None


def best_so_far(folder: Path, iteration: int, place: Placement) -> dict[str, Any] | None:
    """`best_up_to`, read by the writer for all ranks: they must agree on what is better."""
    read = partial(best_up_to, folder, iteration) if place.is_writer else lambda: None
    best: dict[str, Any] | None = on_all_ranks(read, place)[0]
    return best


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
        self._results = write_results()
        self._queue = AsyncCallsQueue()
        self._pending: tuple[int, Path, Manifest, tuple[str, float] | None] | None = None

        def prepare() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)

        on_writer(prepare, place)

    def save(
        self,
        student: Student,
        iteration: int,
        manifest: Manifest,
        format: CheckpointFormat = "reshardable",
        best: tuple[str, float] | None = None,
    ) -> None:
        """Begins to write `iteration`, after what was begun before is complete.

        Args:
            manifest: what the checkpoint was made from; format, layout, lengths and checksums are added.
            best: validation metric and value of what becomes the best checkpoint when it is complete.

        Raises:
            CheckpointError: this save or the one before failed: no room, no permission, the folder has gone.
        """
        self.finish()
        state = saved_state(student, iteration, format)
        num_bytes = self._total(local_bytes(state))
        counts = {
            **manifest.counts,
            "iteration": iteration,
            "format": format,
            "layout": layout_of(student),
            ARCHITECTURE: asdict(student.architecture),
        }
        # A writer process that outlived a killed run may still be busy with the name of then.
        token = on_all_ranks(time.time_ns, self.place)[0]
        temporary = self.folder / f".{iteration_folder(self.folder, iteration).name}.{token}.tmp"

        def prepare() -> None:
            require_folder(self.folder)
            require_room(self.folder, num_bytes)
            temporary.mkdir()

        on_writer(prepare, self.place)
        try:
            request = begin_writing(state, temporary, self.place)
            on_all_ranks(lambda: self._queue.schedule_async_request(request), self.place)
        except CheckpointError:
            self._give_up(temporary)
            raise
        self._pending = iteration, temporary, replace(manifest, counts=counts), best
        if not self.asynchronous:
            self.finish()

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
        iteration, temporary, manifest, best = self._pending
        try:
            if not self._queue.maybe_finalize_async_calls(blocking=blocking):
                return
            self._complete(iteration, temporary, manifest, best)
        except CheckpointException as cause:
            self._give_up(temporary)
            raise self._write_error(cause) from cause
        except CheckpointError:
            self._give_up(temporary)
            raise
        self._pending = None
        self.saved = iteration

    def _complete(self, iteration: int, temporary: Path, manifest: Manifest, best: tuple[str, float] | None) -> None:
        """Checksums, manifest, name, tracker."""
        target = iteration_folder(self.folder, iteration)

        def digests_of_my_share() -> dict[str, str]:
            return {
                path.name: sha256_of(path) for path in files_of(temporary)[self.place.rank :: self.place.world_size]
            }

        digests = on_all_ranks(digests_of_my_share, self.place)

        def name_it() -> None:
            counts = {
                **manifest.counts,
                "file_bytes": {path.name: path.stat().st_size for path in files_of(temporary)},
                "file_sha256": {name: digest for part in digests for name, digest in part.items()},
            }
            write_manifest(temporary, replace(manifest, counts=counts))
            take_place(temporary, target)
            if best is not None:
                # Before the tracker: a kill in between has the run validate this step once more.
                write_best(self.folder, iteration, *best)
            write_tracker(self.folder, str(iteration))
            remove_old(self.folder, self.keep, iteration)

        on_writer(name_it, self.place)

    def _give_up(self, temporary: Path) -> None:
        """Removes what was written: on a disk that is nearly full nothing else would fit beside it."""
        self._pending = None

        def end_writers() -> None:
            for call in self._queue.async_calls:
                call.async_caller.close()
            self._results.clear()

        on_all_ranks(end_writers, self.place)
        # The old queue would hand the failed request out again.
        self._queue = AsyncCallsQueue()
        on_writer(lambda: shutil.rmtree(temporary, ignore_errors=True), self.place)

    def _write_error(self, cause: CheckpointException) -> CheckpointError:
        reasons = [str(failure[0] if isinstance(failure, tuple) else failure) for failure in cause.failures.values()]
        return CheckpointError(
            "a checkpoint could not be written" + (f" ({reasons[0]})" if reasons else ""),
            where=str(self.folder),
            remedy=REMEDY,
        )

    def _total(self, num_bytes: int) -> int:
        total = torch.tensor(num_bytes, dtype=torch.int64, device=self.place.device)
        dist.all_reduce(total)
        return int(total)
