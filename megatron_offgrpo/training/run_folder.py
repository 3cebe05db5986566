"""The folder of a training run: manifest, metrics.jsonl and TensorBoard events, continued after a resume."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_offgrpo.artifacts import MANIFEST, Manifest, read_manifest, write_manifest
from megatron_offgrpo.errors import ConfigError
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


def open_run(folder: Path, manifest: Manifest, recipe: str) -> None:
    """Writes the run's manifest, or checks that the folder holds this very run.

    Raises:
        ConfigError: another run lies there: other inputs or settings.
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
                remedy=f"choose another --set paths.output=FOLDER, or start over with: offgrpo train {recipe} --force",
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, manifest)


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

    Lines from `first_step` on are dropped: a resume or a rollback computes them again.

    Args:
        enabled: False on all ranks but one; nothing is then written.
    """

    def __init__(self, folder: Path, first_step: int, tracking: Tracking, *, enabled: bool = True) -> None:
        self._folder, self._first_step, self._tracking, self._enabled = folder, first_step, tracking, enabled

    def __enter__(self) -> "MetricsLog":
        if self._enabled:
            path = self._folder / METRICS_FILE
            kept = [line for line in read_metrics(self._folder) if line["step"] < self._first_step]
            shorter = path.with_name(f".{METRICS_FILE}.tmp")
            shorter.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(shorter, path)
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._first_step)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._enabled:
            self._file.close()
            self._board.close()

    def write(self, values: dict[str, float]) -> None:
        """Writes one step; `values` holds `step`."""
        if not self._enabled:
            return
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for name, value in values.items():
            if name != "step":
                self._board.add_scalar(name, value, int(values["step"]))
        self._tracking.write(values)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The logged steps of a run; a line cut off by a kill is left out."""
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
