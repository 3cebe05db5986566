"""The folder of a training run: manifest, metrics.jsonl and TensorBoard events, continued after a resume."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_offgrpo.artifacts import MANIFEST, Manifest, read_manifest, write_manifest
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.progress import say
from megatron_offgrpo.training.appended_file import AppendedFile
from megatron_offgrpo.training.event_file import EventFile
from megatron_offgrpo.training.tracking import Tracking

METRICS_FILE = "metrics.jsonl"
# A run resumed with other values of these is still the same run.
_FREE_FIELDS = (
    ("paths",),
    ("layout",),
    ("checkpoint",),
    ("validation",),
    ("fault",),
    ("tracking",),
    ("name",),
    ("model", "head_chunk_mebibytes"),
    ("model", "recompute"),
)


def open_run(folder: Path, manifest: Manifest, *, start_over: str) -> None:
    """Writes the run's manifest, or checks that the folder holds this very run.

    Raises:
        ConfigError: another run lies there: other inputs or settings; or nothing can be written there.
    """
    if (folder / MANIFEST).exists():
        old = read_manifest(folder, "run", remedy="choose another paths.output")
        difference = _first_difference(old, manifest)
        if difference:
            where, before, now = difference
            raise ConfigError(
                "the output folder holds a run with other settings",
                where=f"{folder}: {where}",
                expected=before,
                got=now,
                remedy=f"choose another --set paths.output=FOLDER, or start over with: {start_over}",
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
    except OSError as cause:
        raise ConfigError(
            f"the output folder cannot be written ({cause.strerror})",
            where=str(folder),
            remedy="look at space, quota and permissions there, or choose another paths.output",
        ) from None


def clear(folder: Path) -> None:
    """Deletes what lies in the folder, for a run that starts over.

    Raises:
        ConfigError: something cannot be deleted; a run would go on from it.
    """
    try:
        # The manifest last: it says of which run the rest is. The folder itself may be a link or a mount.
        for path in sorted(folder.iterdir() if folder.exists() else [], key=lambda path: path.name == MANIFEST):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as cause:
        raise ConfigError(
            f"--force cannot delete what is there ({cause.strerror or cause})",
            where=str(folder),
            remedy=f"delete {folder} by hand, or choose another --set paths.output=FOLDER",
        ) from None


def _first_difference(old: Manifest, new: Manifest) -> tuple[str, Any, Any] | None:
    for name, value in new.inputs.items():
        if old.inputs.get(name) != value:
            return f"input {name}", old.inputs.get(name), value
    before, now = _flat(old.config), _flat(new.config)
    for path in sorted(before.keys() | now.keys()):
        free = any(path[: len(field)] == field for field in _FREE_FIELDS)
        if not free and before.get(path) != now.get(path):
            return ".".join(path), before.get(path), now.get(path)
    return None


def _flat(config: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in config.items():
        flat |= _flat(value, (*prefix, name)) if isinstance(value, dict) else {(*prefix, name): value}
    return flat


class MetricsLog:
    """Appends one JSON line a step, and the same values to TensorBoard and W&B; a context manager.

    Lines from `first_step` on are dropped: a resume or a rollback computes them again. A disk that is full does not end
    the run: see `AppendedFile`.

    Args:
        enabled: False on all ranks but one; nothing is then written.

    Raises:
        DataError: on entering, where a line that must be kept is broken.
    """

    def __init__(self, folder: Path, first_step: int, tracking: Tracking, *, enabled: bool = True) -> None:
        self._folder, self._first_step, self._tracking, self._enabled = folder, first_step, tracking, enabled

    def __enter__(self) -> "MetricsLog":
        if self._enabled:
            path = self._folder / METRICS_FILE
            self._lines = AppendedFile(path, _end_of_kept(path, self._first_step))
            self._board = EventFile(self._folder / "tensorboard", self._first_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._enabled:
            self._lines.close()
            self._board.close()

    def write(self, values: dict[str, float]) -> None:
        """Writes one step; `values` holds `step`."""
        if not self._enabled:
            return
        self._lines.write(json.dumps(values).encode() + b"\n")
        self._board.write(values)
        self._tracking.write(values)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The logged steps of a run; a last line that a kill or a power loss has broken is left out.

    Raises:
        DataError: another line is broken.
    """
    path = folder / METRICS_FILE
    return [values for values, _ in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[tuple[dict[str, float], int]]:
    """The steps in the file, each with the place where its line ends."""
    end, lines = 0, path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        values = _parsed(line)
        if values is None and number == len(lines):
            return
        if values is None:
            raise DataError(
                "a broken line",
                where=f"{path}:{number}",
                expected="a JSON object with step",
                got=repr(line[:40]),
                remedy="delete this line",
            )
        end += len(line) + 1
        yield values, end


def _parsed(line: bytes) -> dict[str, float] | None:
    try:
        values = json.loads(line.decode())
    except ValueError:
        return None
    return values if isinstance(values, dict) and "step" in values else None


def _end_of_kept(path: Path, first_step: int) -> int:
    """Where the lines of the steps before `first_step` end; says where a broken end is cut off with the others."""
    end, number = 0, 1
    for values, place in _whole_lines(path):
        if values["step"] >= first_step:
            return end
        end, number = place, number + 1
    if path.exists() and path.stat().st_size > end:
        say(f"train: {path}:{number}: cut off a broken line")
    return end
