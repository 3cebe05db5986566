"""Where the writers of a checkpoint, which Megatron forks, leave for their rank what they have written."""

from megatron_offgrpo.parallel import portable  # noqa: F401  # isort: skip

import os
import pickle
import queue
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

_LENGTH_BYTES = 8


class WriteResults:
    """Megatron's queue of write results, of one save at a time, in memory that forked processes share.

    Megatron's own is held by another process, which costs each rank a start of torch, outlives a killed rank, and dies
    of the signal by which Slurm asks the ranks to save: Slurm sends it to every process of the step.
    """

    def __init__(self) -> None:
        self._memory = os.memfd_create("write_results")

    def put(self, results: Any) -> None:
        """Leaves `results`; called by the writers' process, of which nothing is seen where it dies in between."""
        content = pickle.dumps(results)
        with open(self._memory, "r+b", closefd=False) as memory:
            memory.seek(_LENGTH_BYTES)
            memory.write(content)
            memory.flush()
            memory.seek(0)
            memory.write(len(content).to_bytes(_LENGTH_BYTES, "big"))

    def get_nowait(self) -> Any:
        """What was left, once.

        Raises:
            queue.Empty: the writers ended before they had written all.
        """
        with open(self._memory, "rb", closefd=False) as memory:
            memory.seek(0)
            length = int.from_bytes(memory.read(_LENGTH_BYTES), "big")
            content = memory.read(length)
        if not length:
            raise queue.Empty
        self.clear()
        return pickle.loads(content)

    def clear(self) -> None:
        """Forgets what a save that was given up has written; the next save would take it for its own."""
        os.truncate(self._memory, 0)


def write_results() -> WriteResults:
    """This rank's, which Megatron's writers use from the first call on."""
    if not isinstance(filesystem_async._results_queue, WriteResults):
        filesystem_async._results_queue = WriteResults()
    return filesystem_async._results_queue
