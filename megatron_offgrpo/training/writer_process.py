"""The process that holds the results of Megatron's checkpoint writers."""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

import signal
from multiprocessing import get_context, resource_tracker
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_offgrpo.parallel.local import end_with_parent


def start_writer_process() -> None:
    """Starts it once, so that it ends when this rank does and not before.

    The one that Megatron starts outlives a killed rank, and dies of the signal by which Slurm asks the ranks to save:
    Slurm sends it to every process of the step.
    """
    if filesystem_async._results_queue is not None:
        return
    manager = SyncManager(ctx=get_context("spawn"))
    asked_to_save = {signal.SIGUSR1, signal.SIGTERM}
    # A started process inherits what is blocked, and keeps it so.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asked_to_save)
    try:
        resource_tracker.ensure_running()  # started with the first process; unblocks SIGTERM here
        signal.pthread_sigmask(signal.SIG_BLOCK, asked_to_save)
        manager.start(end_with_parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    filesystem_async._results_queue = manager.Queue()


def drop_results() -> None:
    """Forgets what a save that was given up has written; the next save would take it for its own."""
    results = filesystem_async._results_queue
    while not results.empty():
        results.get()
