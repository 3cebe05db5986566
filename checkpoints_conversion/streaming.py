"""Moves a model's tensors in parallel within a fixed amount of memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Condition

from checkpoints_conversion.ops import Same
from checkpoints_conversion.planning import Move

BLOCK_BYTES = 2 * 2**20
"""Bytes of a tensor in memory at once, where it is moved without being reordered; few enough for the cache."""
MIN_BUDGET_BYTES = 256 * 2**20
WORKERS = 2


@dataclass(frozen=True)
class Job:
    """Work on one move, and about how much memory it takes."""

    num_bytes: int
    run: Callable[[], None]


def row_blocks(move: Move, itemsize: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of the blocks in which a move is done; one block where rows change their order."""
    rows, *columns = move.region.shape
    row_bytes = itemsize
    for size in columns:
        row_bytes *= size
    step = max(1, BLOCK_BYTES // row_bytes) if isinstance(move.op, Same) else rows
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def memory_of(move: Move, itemsize: int) -> int:
    """About how many bytes a move holds: its largest block, as read and as written."""
    _, *columns = move.region.shape
    largest = max(count for _, count in row_blocks(move, itemsize))
    for size in columns:
        largest *= size
    return 2 * largest * itemsize


def run_all(jobs: Iterable[Job]) -> None:
    """Runs the jobs on a few threads, as many at once as the budget of memory allows; the first error stops them all.

    Reading, hashing, writing and torch's copies all leave Python's lock, so the threads do overlap.
    """
    ordered: Sequence[Job] = list(jobs)
    budget = max([MIN_BUDGET_BYTES, *(job.num_bytes for job in ordered)])
    room = _Room(budget)
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(room.run, job) for job in ordered]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in done:
            future.result()


class _Room:
    """Bytes that jobs may hold at once."""

    def __init__(self, budget: int) -> None:
        self.free = budget
        self.changed = Condition()

    def run(self, job: Job) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.free >= job.num_bytes)
            self.free -= job.num_bytes
        try:
            job.run()
        finally:
            with self.changed:
                self.free += job.num_bytes
                self.changed.notify_all()
