"""Runs the parts that are missing: in this process, or in several that end with it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

from megatron_offgrpo.data.grading import GradingPool
from megatron_offgrpo.data.part_files import PartFolder
from megatron_offgrpo.data.part_worker import PartWorker
from megatron_offgrpo.data.readers import Part
from megatron_offgrpo.data_config import PrepareConfig
from megatron_offgrpo.errors import OffgrpoError

FEW_PARTS = 4
"""So many parts or fewer are done in this process: starting others takes longer."""

Numbered = tuple[int, Part]


def num_workers(config: PrepareConfig) -> int:
    """Processes to use."""
    return config.workers or len(os.sched_getaffinity(0))


def _pool(config: PrepareConfig, processes: int) -> GradingPool:
    return GradingPool(processes, config.grading_timeout_seconds, think_tags=config.think_tags)


def needs_signatures(config: PrepareConfig) -> bool:
    """Whether near-duplicates matter."""
    return config.filters.near_duplicates is not None or config.validation_share > 0


def run_parts(config: PrepareConfig, folder: PartFolder, parts: Iterable[Numbered]) -> None:
    """Does the parts, in any order; each is on disk as soon as it is done.

    Raises:
        OffgrpoError: what went wrong in a part, or a process that died.
    """
    source = iter(parts)
    first = list(islice(source, FEW_PARTS + 1))
    if not first:
        return
    if len(first) <= FEW_PARTS or num_workers(config) == 1:
        with _pool(config, num_workers(config)) as pool:
            worker = PartWorker(config, pool)
            for number, part in chain(first, source):
                folder.write(number, worker.work(part), with_signatures=needs_signatures(config))
    else:
        _run_in_processes(config, folder, chain(first, source))


def _run_in_processes(config: PrepareConfig, folder: PartFolder, parts: Iterator[Numbered]) -> None:
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, Any] = {}
    idle: list[Any] = []
    try:
        busy: set[Any] = set()
        while True:
            # A process is started when there is a part for it.
            while (idle or len(processes) < num_workers(config)) and (task := next(parts, None)) is not None:
                if not idle:
                    ours, theirs = context.Pipe()
                    processes[ours] = context.Process(target=_serve, args=(theirs, config, folder), daemon=False)
                    processes[ours].start()
                    # Only the child holds its end now, so that each side notices when the other is gone.
                    theirs.close()
                    idle.append(ours)
                _send(processes, idle[-1], task)
                busy.add(idle.pop())
            if not busy:
                break
            for ready in multiprocessing.connection.wait(list(busy)):
                _receive(processes[ready], ready)
                busy.remove(ready)
                idle.append(ready)
    finally:
        for connection, process in processes.items():
            connection.close()
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
                process.join()


def _send(processes: dict[Any, Any], connection: Any, task: Numbered) -> None:
    try:
        connection.send(task)
    except BrokenPipeError:
        # It failed before it took a part: what it said last tells why.
        _receive(processes[connection], connection)
        raise _died(processes[connection]) from None


def _receive(process: Any, connection: Any) -> None:
    try:
        error = connection.recv()
    except (EOFError, ConnectionResetError):
        raise _died(process) from None
    if isinstance(error, OffgrpoError):
        raise error
    if error is not None:
        raise RuntimeError(f"a worker failed:\n{error}")


def _died(process: Any) -> OffgrpoError:
    process.join(timeout=5)
    return OffgrpoError(
        "a worker process ended by itself",
        where="prepare",
        got=f"exit status {process.exitcode}",
        remedy="too little memory? take fewer --workers; finished parts are kept",
    )


def _serve(connection: Any, config: PrepareConfig, folder: PartFolder) -> None:
    """A worker process: takes parts until the other side closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with _pool(config, 1) as pool:
            worker = PartWorker(config, pool)
            while True:
                try:
                    number, part = connection.recv()
                except EOFError:
                    return
                folder.write(number, worker.work(part), with_signatures=needs_signatures(config))
                connection.send(None)
    except OffgrpoError as error:
        _say(connection, error)
    except OSError as cause:
        _say(connection, file_error(cause, folder))
    except Exception:
        _say(connection, traceback.format_exc())


def file_error(cause: OSError, folder: PartFolder) -> OffgrpoError:
    """What the file system refused, in one line."""
    remedy = "mend it and run the same command again: finished parts are kept"
    return OffgrpoError(f"the file system refuses ({cause})", where=str(folder.path), remedy=remedy)


def _say(connection: Any, error: object) -> None:
    try:
        connection.send(error)
    except BrokenPipeError:
        print(error)
