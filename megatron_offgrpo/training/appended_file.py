"""A file to which records are appended, also where the disk is full for a while."""

from pathlib import Path

from megatron_offgrpo.progress import say


class AppendedFile:
    """Appends whole records; what cannot be written is said once, kept in memory, and tried again with the next record.

    The file is opened for each record, since a network file system may report a full disk only when it is closed. Its
    folder is not made: after an unmount the records would go astray.

    Args:
        end: where the first record goes; what lies behind it is cut off at once.
    """

    def __init__(self, path: Path, end: int = 0) -> None:
        self.path, self._end = path, end
        self._unwritten: list[bytes] = []
        self._problem = ""
        self._try()

    def write(self, record: bytes) -> None:
        """Writes what is still to be written, and the record."""
        self._unwritten.append(record)
        self._try()

    def close(self) -> None:
        """Tries once more what is still to be written."""
        if self._unwritten:
            self._try()
        if self._unwritten:
            say(f"train: {self.path} lacks its last {len(self._unwritten)} records ({self._problem})")

    def _try(self) -> None:
        text = b"".join(self._unwritten)
        try:
            with self.path.open("ab") as file:
                # Behind `_end` lies part of what an attempt before could not write whole.
                start = min(self._end, file.tell())
                file.truncate(start)
                file.write(text)
        except OSError as cause:
            if not self._problem:
                say(f"train: {self.path} cannot be written ({cause.strerror}); training goes on, each step tries again")
            self._problem = cause.strerror or str(cause)
            return
        self._end, self._unwritten, self._problem = start + len(text), [], ""
