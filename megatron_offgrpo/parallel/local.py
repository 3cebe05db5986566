"""Local processes for a command that was started plainly: what torchrun does, but signals reach the ranks.

torchrun's agent ends its workers on SIGUSR1; here SIGTERM and SIGUSR1 are passed on, and the ranks save and exit 0.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from types import FrameType

GRACE_SECONDS = 10.0


def is_launched() -> bool:
    """True under torchrun, srun or `run_local`: this process is one rank."""
    return "RANK" in os.environ or _is_srun_task()


def _is_srun_task() -> bool:
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def world_size() -> int:
    """Number of launched processes; 1 where the command was started plainly."""
    _adopt_slurm_environment()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _adopt_slurm_environment() -> None:
    """Under srun without torchrun, fills in the variables that torch.distributed reads."""
    if "RANK" in os.environ or not _is_srun_task():
        return
    slurm = os.environ
    os.environ |= {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        # srun runs in the batch script, on the node of rank 0.
        "MASTER_ADDR": slurm.get("MASTER_ADDR", slurm["SLURM_LAUNCH_NODE_IPADDR"]),
        "MASTER_PORT": slurm.get("MASTER_PORT", str(20000 + int(slurm["SLURM_JOB_ID"]) % 20000)),
    }


def run_local(command: Sequence[str], num_processes: int) -> int:
    """Runs `command` as `num_processes` ranks on this machine.

    Returns:
        0 if all ranks succeeded, else the first failure's exit status, after the other ranks were ended.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    ranks = []
    for rank in range(num_processes):
        environment = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        return _wait(ranks)
    finally:
        _end(ranks)
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen]) -> None:
    """Ends what still runs; SIGKILL at once, since a rank that lost a peer hangs in a collective."""
    for process in ranks:
        if process.poll() is None:
            process.kill()
    for process in ranks:
        process.wait(GRACE_SECONDS)
