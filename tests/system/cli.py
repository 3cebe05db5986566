"""Runs `offgrpo` as a user would, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megatron_offgrpo.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Without what a surrounding launcher may have set, and with the test folder importable for its recipes."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def offgrpo(
    *arguments: object, cwd: Path, expect: int = 0, timeout_seconds: float = 300
) -> subprocess.CompletedProcess:
    """Runs the command and checks its exit status; returns it with both outputs as text."""
    done = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout_seconds
    )
    assert done.returncode == expect, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done
