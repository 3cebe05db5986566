"""The process that holds the results of Megatron's checkpoint writers."""

from multiprocessing import get_context
from multiprocessing.managers import SyncManager

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_offgrpo.parallel.local import end_with_parent


def start_writer_process() -> None:
    """Starts it once, so that it ends when this rank does: the one that Megatron starts outlives a killed rank."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()
