"""A study that is killed leaves no worker behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from tools.study.runner import _start_worker

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_study_leaves_no_worker(tmp_path):
    script = tmp_path / "study.py"
    script.write_text(PROGRAM)
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as study:
        worker = int(study.stdout.readline())
        assert is_alive(worker)
        study.send_signal(signal.SIGKILL)
        study.wait()
        deadline = time.monotonic() + 30
        while is_alive(worker):
            assert time.monotonic() < deadline
            time.sleep(0.05)
