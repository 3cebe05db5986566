"""Starts real processes over gloo for a test, and gathers what went wrong."""

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_offgrpo.training.write_results import write_results

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


def run_ranks(
    function: str, world_size: int, *, timeout_seconds: float = 300, stand_ins: Path | None = None, **arguments: Any
) -> None:
    """Calls `module:function` with JSON-able arguments in `world_size` processes; fails with the ranks' last output.

    The ranks are forks of one process without threads that has imported torch, Megatron and the trainer: to import
    them takes longer than most of what is tested. With `stand_ins`, a folder of packages that Megatron is to find
    when it is imported, they are started anew.
    """
    context = multiprocessing.get_context("spawn" if stand_ins else "forkserver")
    context.set_forkserver_preload(["tests.distributed.imported_once"])
    port = free_port()
    with tempfile.TemporaryDirectory() as outputs:
        files = [Path(outputs) / str(rank) for rank in range(world_size)]
        for file in files:
            file.touch()
        ranks = [
            context.Process(target=_call, args=(function, arguments, rank_environment(rank, world_size, port), file))
            for rank, file in enumerate(files)
        ]
        with mock.patch.object(sys, "path", [str(stand_ins), *sys.path] if stand_ins else sys.path):
            for process in ranks:
                process.start()
        try:
            for process in ranks:
                process.join(timeout_seconds)
        finally:
            hanging = [rank for rank, process in enumerate(ranks) if _kill(process)]
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
        if failed:
            said = {rank: files[rank].read_text(errors="replace")[-8000:] for rank in failed}
            raise AssertionError("\n".join(f"rank {r}{' (hung)' if r in hanging else ''}: {said[r]}" for r in failed))


def _kill(process: BaseProcess) -> bool:
    hangs = process.is_alive()
    process.kill()
    process.join()
    return hangs


def _call(function: str, arguments: dict[str, Any], environment: dict[str, str], output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # what OMP_NUM_THREADS says was read before the fork
    # Also for workers that save with Megatron's own functions: its queue starts another process for each rank.
    write_results()
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(**arguments)
