"""Reads and writes at given offsets of several files, from several threads."""

import os
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from megatron_offgrpo.errors import CheckpointError


class FilePool:
    """Files that stay open; every access names its offset, so threads do not disturb each other.

    Plain reads instead of memory maps: pages of a map would count as this process's memory, and a model would seem to
    need as much as its size.
    """

    def __init__(self, mode: str = "rb") -> None:
        self._mode = mode
        self._files: dict[Path, int] = {}
        self._lock = Lock()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY if self._mode == "rb" else os.O_RDWR)
            return self._files[path]

    def read(self, path: Path, offset: int, target: memoryview) -> None:
        """Fills `target` from the file.

        Raises:
            CheckpointError: the file ends before.
        """
        descriptor = self._descriptor(path)
        while len(target):
            got = os.preadv(descriptor, [target], offset)
            if not got:
                raise CheckpointError("truncated file", where=str(path), expected=f"more than {offset} bytes")
            target, offset = target[got:], offset + got

    def write(self, path: Path, offset: int, source: memoryview) -> None:
        """Puts `source` into the file."""
        descriptor = self._descriptor(path)
        while len(source):
            written = os.pwrite(descriptor, source, offset)
            source, offset = source[written:], offset + written

    def close(self, *, sync: bool = False) -> None:
        """Closes all files, with `sync` after their bytes are on disk."""
        for descriptor in self._files.values():
            if sync:
                os.fsync(descriptor)
            os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        self.close()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without copying."""
    assert tensor.is_contiguous()
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())
