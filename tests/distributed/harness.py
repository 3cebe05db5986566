"""Starts real processes over gloo for a test, and gathers what went wrong."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set for this rank, with the machine's two cores shared by the ranks."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(function: str, world_size: int, *, timeout_seconds: float = 300, **arguments: Any) -> None:
    """Calls `module:function` with JSON-able arguments in `world_size` processes; fails with the ranks' last output."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.harness", function, json.dumps(arguments)]
    processes = [
        subprocess.Popen(
            command,
            env=rank_environment(rank, world_size, port),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if failed:
        raise AssertionError("\n".join(f"rank {rank}: {outputs[rank][-4000:]}" for rank in failed))


def _call(function: str, arguments: str) -> None:
    import importlib

    # Before the workers' own imports of Megatron, whose start it halves.
    from megatron_offgrpo.parallel import portable  # noqa: F401

    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(**json.loads(arguments))


if __name__ == "__main__":
    _call(sys.argv[1], sys.argv[2])
