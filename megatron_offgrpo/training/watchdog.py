"""Ends a rank that hangs, after writing the stacks of its threads.

A rank that waits for a dead or stuck peer hangs as well, so that every rank of a hanging run times out and leaves its
stacks: the odd one among them is the culprit. The next attempt of the run keeps them, under a name of their own.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from megatron_offgrpo.progress import say

FOLDER = "stacks"
LINGER_SECONDS = 3.0
"""Between the stacks and the end of a rank: its end breaks the collectives of those that are about to leave theirs."""
WORD_SECONDS = LINGER_SECONDS + 2.0
"""The one-line message comes so long before the end; a hang that holds the interpreter lock ends without it."""


class Watchdog:
    """Ends the process with status 1 where `alive` is not called for `timeout_seconds`; a context manager."""

    def __init__(self, folder: Path, rank: int, timeout_seconds: float) -> None:
        self._path, self._rank, self._seconds = folder / FOLDER / f"rank_{rank}.txt", rank, timeout_seconds
        self._stop = threading.Event()
        self._deadline = time.monotonic() + timeout_seconds
        self._doing = "start"

    def __enter__(self) -> "Watchdog":
        self._file = self._open()
        threading.Thread(target=self._watch, daemon=True).start()
        self.alive(self._doing)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        faulthandler.cancel_dump_traceback_later()
        if self._file is sys.stderr:
            return
        is_empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if is_empty:
            self._path.unlink(missing_ok=True)

    def _open(self) -> TextIO:
        """An empty file for the stacks; those of an earlier attempt stay beside it, under the time of their hang."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists() and (old := self._path.stat()).st_size:
                hung = time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime(old.st_mtime))
                self._path.rename(self._path.with_name(f"{self._path.stem}_{hung}.txt"))
            return self._path.open("w", encoding="utf-8")
        except OSError as cause:
            say(f"rank {self._rank}: {self._path} cannot be opened ({cause.strerror}): stacks go to standard error")
            return sys.stderr

    def alive(self, doing: str) -> None:
        """Starts the time again; `doing` names what comes next, for the message."""
        self._doing, self._deadline = doing, time.monotonic() + self._seconds
        # A thread of C code, which needs no interpreter lock.
        faulthandler.dump_traceback_later(self._seconds + WORD_SECONDS, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._stop.wait(max(0.1, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                what = f"rank {self._rank}: error: no progress for {self._seconds:g} s in {self._doing}"
                where = f"its stacks are in {self._file.name}, compare those of all ranks"
                remedy = "remedy: raise fault.timeout_seconds if it was only slow"
                say("; ".join((what, where, remedy)))
                faulthandler.dump_traceback(self._file)
                time.sleep(LINGER_SECONDS)
                os._exit(1)
