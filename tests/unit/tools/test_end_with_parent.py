"""A study that is killed leaves none of its workers behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKER = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from tools.study.parent import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_process_leaves_none_behind(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert is_alive(worker)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 30
        while is_alive(worker):
            assert time.monotonic() < deadline
            time.sleep(0.05)
