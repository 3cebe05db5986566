"""Keeps the daemons of a throw-away Slurm, and ends all of them when its owner closes standard input or dies.

`python -m tests.system.slurm.daemons FOLDER < pipe`, with FOLDER/daemons.json: a list of {"command": [...],
"ready": path of a socket file, a port number, or null}.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
START_SECONDS = 20.0
END_SECONDS = 10.0


class Daemons:
    """The processes of one cluster, their job steps included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[subprocess.Popen] = []
        # Steps that slurmd detaches from itself become children of this process, so that none is left behind.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def start(self, command: list[str], ready: str | int | None) -> None:
        """Starts one daemon in the foreground and waits until it listens."""
        name = Path(command[0]).name
        with (self.folder / "log" / f"{len(self.running)}-{name}.out").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder)
        self.running.append(process)
        wait_for(lambda: process.poll() is not None or is_ready(ready), START_SECONDS)

    def all_alive(self) -> bool:
        return all(process.poll() is None for process in self.running)

    def reap(self) -> None:
        """Collects exit statuses of detached steps, not those of the daemons."""
        own = {process.pid for process in self.running}
        for pid in descendants() - own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def end(self) -> None:
        """SIGTERM to the daemons, last started first; then SIGKILL to whatever is left of them and of the jobs."""
        for process in reversed(self.running):
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        wait_for(self._killed_all, END_SECONDS)

    def _killed_all(self) -> bool:
        left = descendants()
        for pid in left:
            # It may have ended by itself, or be another's child.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        return not left


def is_ready(ready: str | int | None) -> bool:
    if isinstance(ready, int):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", ready)) == 0
    return ready is None or Path(ready).exists()


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def descendants() -> set[int]:
    """All processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def main(folder: Path) -> None:
    owner = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    daemons = Daemons(folder)
    try:
        specifications: list[dict[str, Any]] = json.loads((folder / "daemons.json").read_text())
        for specification in specifications:
            daemons.start(specification["command"], specification["ready"])
        while daemons.all_alive():
            daemons.reap()
            if select.select([0], [], [], 0.5)[0] and not os.read(0, 1):
                break
    finally:
        daemons.end()
        if os.getppid() != owner:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
