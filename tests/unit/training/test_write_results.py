"""What forked writers leave for their rank."""

import io
import multiprocessing
import os
import queue
import signal

import pytest

from megatron_offgrpo.training import write_results
from megatron_offgrpo.training.write_results import WriteResults

fork = multiprocessing.get_context("fork")


class KilledOnceWritten(io.BufferedRandom):
    """A file that ends its process when what was written is flushed."""

    def flush(self):
        super().flush()
        os.kill(os.getpid(), signal.SIGKILL)


def in_a_fork(function, *arguments) -> int:
    process = fork.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_a_rank_gets_once_what_its_fork_has_put():
    results = WriteResults()
    written = {0: [("file", b"x" * 1_000_000)], 1: RuntimeError("no room")}
    assert in_a_fork(results.put, written) == 0
    got = results.get_nowait()
    assert got[0] == written[0]
    assert str(got[1]) == "no room"
    with pytest.raises(queue.Empty):
        results.get_nowait()


@pytest.mark.parametrize("length", [10, 2_000_000])
def test_a_later_result_is_not_mixed_with_an_earlier_one(length):
    results = WriteResults()
    for content in ("a" * 1_000_000, "b" * length):
        assert in_a_fork(results.put, content) == 0
        assert results.get_nowait() == content


def test_a_fork_killed_before_its_end_leaves_nothing(monkeypatch):
    results = WriteResults()

    def killed(memory, _, closefd):
        return KilledOnceWritten(io.FileIO(memory, "r+", closefd=closefd))

    with monkeypatch.context() as patched:
        patched.setattr(write_results, "open", killed, raising=False)
        assert in_a_fork(results.put, "half") == -signal.SIGKILL
    assert os.stat(results._memory).st_size > len("half")
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_what_is_cleared_is_not_taken_for_the_next():
    results = WriteResults()
    assert in_a_fork(results.put, "given up") == 0
    results.clear()
    with pytest.raises(queue.Empty):
        results.get_nowait()
