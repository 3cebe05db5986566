"""Ends a rank that hangs, after writing the stacks of its threads.

A rank that waits for a dead or stuck peer hangs as well, so that every rank of a hanging run times out and leaves its
stacks: the odd one among them is the culprit.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

FOLDER = "stacks"
WORD_SECONDS = 2.0
"""The one-line message comes so long before the end; a hang that holds the interpreter lock ends without it."""


class Watchdog:
    """Ends the process with status 1 where `alive` is not called for `timeout_seconds`; a context manager."""

    def __init__(self, folder: Path, rank: int, timeout_seconds: float) -> None:
        self._path, self._rank, self._seconds = folder / FOLDER / f"rank_{rank}.txt", rank, timeout_seconds
        self._stop = threading.Event()
        self._deadline = time.monotonic() + timeout_seconds
        self._doing = "start"

    def __enter__(self) -> "Watchdog":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w", encoding="utf-8")
        threading.Thread(target=self._watch, daemon=True).start()
        self.alive(self._doing)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._path.unlink(missing_ok=True)

    def alive(self, doing: str) -> None:
        """Starts the time again; `doing` names what comes next, for the message."""
        self._doing, self._deadline = doing, time.monotonic() + self._seconds
        # A thread of C code, which needs no interpreter lock.
        faulthandler.dump_traceback_later(self._seconds + WORD_SECONDS, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._stop.wait(max(0.1, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                what = f"rank {self._rank}: error: no progress for {self._seconds:g} s in {self._doing}"
                where = f"its stacks are in {self._path}, compare those of all ranks"
                remedy = "remedy: raise fault.timeout_seconds if it was only slow"
                print("; ".join((what, where, remedy)), file=sys.stderr, flush=True)
                faulthandler.dump_traceback(self._file)
                self._file.flush()
                os._exit(1)
