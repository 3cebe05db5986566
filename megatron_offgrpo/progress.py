"""Progress of anything longer than two seconds: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_LINE_EVERY_SECONDS = 5.0


class Advance(Protocol):
    """Called with the amount done since the last call, and an optional note such as `loss 0.12`."""

    def __call__(self, amount: float = 1, note: str = "") -> None: ...


def say(line: str) -> None:
    """One plain line of progress to standard error; standard output stays for results."""
    # A log on a full disk must not end the run that writes it, and there is nowhere else to say so.
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: float, *, enabled: bool = True) -> Iterator[Advance]:
    """Shows progress of a task of `total` units; `enabled` is False on all ranks but one."""
    if not enabled:
        yield lambda amount=1, note="": None
    elif sys.stderr.isatty():
        with _bar(description, total) as advance:
            yield advance
    else:
        yield _PlainLines(description, total)


@contextmanager
def _bar(description: str, total: float) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: float = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance


class _PlainLines:
    def __init__(self, description: str, total: float) -> None:
        self.description, self.total, self.done = description, total, 0.0
        self.start = self.last = time.monotonic()
        self.finished = False

    def __call__(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        now = time.monotonic()
        just_finished = self.done >= self.total and not self.finished and now - self.start > 2.0
        self.finished |= just_finished
        if just_finished or now - self.last > PLAIN_LINE_EVERY_SECONDS:
            self.last = now
            share = 100 * self.done / max(self.total, 1)
            seconds = now - self.start
            say(f"{self.description}: {self.done:g}/{self.total:g} ({share:.0f} %) {seconds:.0f} s {note}".rstrip())
