"""A process that is killed leaves none of its own behind: workers of a study, Megatron's process for its writers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from megatron_offgrpo.parallel.local import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""
WRITER = """
import time
from multiprocessing import resource_tracker
from megatron_offgrpo.parallel import portable
from megatron_offgrpo.training.writer_process import filesystem_async, start_writer_process

if __name__ == "__main__":
    start_writer_process()
    results = filesystem_async._get_write_results_queue()
    print(results._manager._process.pid, resource_tracker._resource_tracker._pid, flush=True)
    input()
    results.put("written")
    print(results.get(), flush=True)
    time.sleep(600)
"""


def start(program: str, folder: Path) -> subprocess.Popen:
    script = folder / "program.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, script], env=environment, stdin=pipe, stdout=pipe, text=True)


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("program", [WORKER, WRITER], ids=["worker", "writer"])
def test_a_killed_process_leaves_none_behind(tmp_path, program):
    with start(program, tmp_path) as parent:
        worker = int(parent.stdout.readline().split()[0])
        assert is_alive(worker)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 30
        while is_alive(worker):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("asked_to_save", [signal.SIGUSR1, signal.SIGTERM])
def test_the_writers_process_outlives_the_signal_that_asks_its_rank_to_save(tmp_path, asked_to_save):
    """Slurm sends it to every process of the step."""
    with start(WRITER, tmp_path) as parent:
        helpers = [int(number) for number in parent.stdout.readline().split()]
        for helper in helpers:
            os.kill(helper, asked_to_save)
        time.sleep(0.5)
        assert all(is_alive(helper) for helper in helpers)
        print(file=parent.stdin, flush=True)
        assert parent.stdout.readline() == "written\n"
        parent.kill()
