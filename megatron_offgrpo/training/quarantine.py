"""The trajectories that a run leaves out: OUTPUT/quarantine.json, which a rollback extends and every start reads."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_offgrpo.artifacts import fingerprint_of, write_json_atomically
from megatron_offgrpo.data.store import TrajectoryStore
from megatron_offgrpo.errors import DataError, TrainingError

QUARANTINE_FILE = "quarantine.json"


@dataclass(frozen=True)
class BadStep:
    """A step that did not change the weights, and whom it names."""

    step: int
    pack: int
    trajectories: tuple[int, ...]
    """Store indices of the pack's members, ascending."""
    reason: str


@dataclass(frozen=True)
class Quarantine:
    """Who is left out and why: the bad steps in a row behind each rollback, the oldest rollback first."""

    rollbacks: tuple[tuple[BadStep, ...], ...] = ()

    @property
    def trajectories(self) -> list[int]:
        """Store indices, ascending."""
        return sorted({index for steps in self.rollbacks for step in steps for index in step.trajectories})

    def after(self, bad_steps: Iterable[BadStep]) -> "Quarantine":
        """With the packs of these steps as well."""
        return Quarantine((*self.rollbacks, tuple(bad_steps)))

    @property
    def fingerprint(self) -> str:
        """Of what the weights depend on."""
        return fingerprint_of([[(step.step, step.trajectories) for step in steps] for steps in self.rollbacks])


class Rollback(Exception):
    """The run is to start again from its newest checkpoint, without the trajectories of its bad steps."""

    def __init__(self, quarantine: Quarantine) -> None:
        super().__init__(f"rollback {len(quarantine.rollbacks)}")
        self.quarantine = quarantine


def write_quarantine(folder: Path, quarantine: Quarantine, store: TrajectoryStore) -> None:
    """Writes the file at once; it names each trajectory's group for the reader.

    Raises:
        TrainingError: no room, no permission.
    """

    def entry(step: BadStep) -> dict[str, object]:
        groups = [store.row(int(store.group_index[index])).group_id for index in step.trajectories]
        return {**asdict(step), "groups": groups}

    rollbacks = [{"bad_steps": [entry(step) for step in steps]} for steps in quarantine.rollbacks]
    value = {"store": store.manifest.fingerprint, "trajectories": quarantine.trajectories, "rollbacks": rollbacks}
    try:
        write_json_atomically(folder / QUARANTINE_FILE, value)
    except OSError as cause:
        raise TrainingError(
            f"the quarantine could not be written ({cause.strerror})",
            where=str(folder / QUARANTINE_FILE),
            remedy="look at space, quota and permissions there; the same command then rolls back again",
        ) from None


def read_quarantine(folder: Path, store: TrajectoryStore) -> Quarantine:
    """The quarantine of the run in `folder`, empty where there is no file.

    Raises:
        DataError: the file is damaged or speaks of another store.
    """
    path = folder / QUARANTINE_FILE
    if not path.exists():
        return Quarantine()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        quarantine = Quarantine(tuple(tuple(map(_bad_step, entry["bad_steps"])) for entry in value["rollbacks"]))
        known = all(0 <= index < store.num_trajectories for index in quarantine.trajectories)
        found = value["store"]
    except (OSError, ValueError, TypeError, KeyError) as cause:
        raise DataError(
            f"unreadable quarantine ({cause})", where=str(path), remedy="offgrpo train with --force starts over"
        ) from None
    if found != store.manifest.fingerprint or not known:
        raise DataError(
            "a quarantine of another store's trajectories",
            where=str(path),
            expected=f"store {store.manifest.fingerprint}, {store.num_trajectories} trajectories",
            got=f"store {found}",
            remedy="take the file away, or choose another paths.output",
        )
    return quarantine


def _bad_step(value: dict) -> BadStep:
    return BadStep(int(value["step"]), int(value["pack"]), tuple(map(int, value["trajectories"])), str(value["reason"]))
