"""Finished samples on disk, one JSON line each, so that a kill costs only what was being computed.

The work folder of a command lies beside its output, `OUTPUT.parts/FINGERPRINT/`, and holds one log a process:
`shard-I-of-N.jsonl` and `rest.jsonl`. Which process wrote a sample does not matter.
"""

import fcntl
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.progress import say

Key = tuple[str, int]
"""Problem id and number of the sample."""


@dataclass(frozen=True)
class Shard:
    """Every `count`-th unit of work, from number `index` on."""

    index: int
    count: int

    @property
    def name(self) -> str:
        return f"shard-{self.index}-of-{self.count}"


def parse_shard(text: str | None) -> Shard | None:
    """`I/N` with I from 0 to N - 1.

    Raises:
        ConfigError: anything else.
    """
    if text is None:
        return None
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ConfigError("no such share of the work", where="--shard", expected="I/N with I from 0 to N-1", got=text)
    return Shard(int(first), int(second))


class SampleLogs:
    """All logs in a work folder: which samples are there, and each one on request (texts stay on disk)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[Key, tuple[Path, int]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            self._index(path)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: Key) -> dict[str, Any]:
        """The logged sample.

        Raises:
            DataError: it is not there.
        """
        if key not in self._places:
            raise DataError(f"no sample {key[1]} of problem {key[0]!r}", where=str(self.folder))
        path, offset = self._places[key]
        with path.open("rb") as file:
            file.seek(offset)
            record: dict[str, Any] = json.loads(file.readline())
        return record

    def _index(self, path: Path) -> None:
        offset = damaged = 0
        with path.open("rb") as file:
            for line in file:
                key = _key(line)
                if key is None:
                    damaged += 1
                else:
                    self._places.setdefault(key, (path, offset))
                offset += len(line)
        if damaged:
            say(f"{path}: {damaged} unfinished line(s) left out; these samples are drawn again")


def _key(line: bytes) -> Key | None:
    """The sample that a line holds; None for a line that a kill or a full disk cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
        return record["problem_id"], record["sample_id"]
    except (ValueError, TypeError, KeyError):
        return None


class LogWriter:
    """Appends to one process's log; a context manager. The file is locked, so that no two processes write one log."""

    def __init__(self, folder: Path, shard: Shard | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{shard.name if shard else 'rest'}.jsonl"
        self._file: BinaryIO = self.path.open("ab")
        _lock(self._file, self.path)
        self._end_torn_line()

    def __enter__(self) -> "LogWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, record: dict[str, Any]) -> None:
        """Writes one sample; it outlives this process from here on."""
        self._file.write(json.dumps(record).encode("ascii") + b"\n")
        self._file.flush()

    def _end_torn_line(self) -> None:
        """A line that a kill cut off is ended, so that the next one stands on its own."""
        if self.path.stat().st_size == 0:
            return
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                self._file.write(b"\n")
                self._file.flush()


def require_idle(folder: Path) -> None:
    """Refuses to go on while a shard is still writing.

    Raises:
        ConfigError: naming its log.
    """
    for path in _logs(folder):
        with path.open("ab") as file:
            _lock(file, path)


def remove_parts(folder: Path) -> None:
    """Removes a work folder whose samples stand in the finished output, and its parent where nothing else is in it."""
    shutil.rmtree(folder)
    if not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _logs(folder: Path) -> Iterable[Path]:
    return sorted(folder.glob("*.jsonl"))


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            "another process is writing this log",
            where=str(path),
            remedy="wait for it, or end it; what it has logged is kept",
        ) from None
    except OSError as cause:  # some network file systems have no locks
        say(f"{path}: this file system has no locks ({cause.strerror}); start each shard only once")
