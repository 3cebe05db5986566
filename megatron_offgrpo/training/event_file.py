"""TensorBoard's events. Its own writer ends its thread with a traceback on a full disk, and may leave half a record."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_offgrpo.training.appended_file import AppendedFile


class EventFile:
    """A new file of events in `folder`; TensorBoard hides what older ones have from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        # TensorBoard reads the files of a folder in the order of their names.
        seconds, rest = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{rest:09d}.{socket.gethostname()}.{os.getpid()}"
        self._make_folder(folder)
        self._file = AppendedFile(folder / name)
        self._write(
            Event(step=first_step, file_version="brain.Event:2"),
            Event(step=first_step, session_log=SessionLog(status=SessionLog.START)),
        )

    def write(self, values: dict[str, float]) -> None:
        """Writes one step; `values` holds `step`."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if name != "step"]
        self._write(Event(step=int(values["step"]), summary=Summary(value=scalars)))

    def close(self) -> None:
        self._file.close()

    def _write(self, *events: Event) -> None:
        records = _Records()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        self._make_folder(self._file.path.parent)
        self._file.write(bytes(records))

    def _make_folder(self, folder: Path) -> None:
        # Without it the file says that it cannot be written.
        with suppress(OSError):
            folder.mkdir(exist_ok=True)


class _Records(bytearray):
    def write(self, data: bytes) -> None:
        self.extend(data)
