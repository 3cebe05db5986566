"""Records that are left out: each one listed with its place and reason, and counted."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

MAX_SHOWN_CHARACTERS = 200


class RecordError(Exception):
    """A record cannot be used.

    Args:
        reason: one of a few fixed phrases, by which rejected records are counted.
        field: path inside the record, such as `trajectories[2].reward`.
    """

    def __init__(self, reason: str, field: str, *, expected: str, got: object) -> None:
        super().__init__(reason)
        self.reason, self.field, self.expected, self.got = reason, field, expected, got


@dataclass(frozen=True)
class Reject:
    """One line of `rejected.jsonl`."""

    where: str
    """file:line (file:row of a Parquet file), 1-based."""
    group_id: str | None
    reason: str
    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.reason}; expected {self.expected}; got {self.got}"


class RejectFile:
    """Writes rejected records to a JSON-lines file as they come, and counts them by reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.last: Reject | None = None
        path.touch()

    def add(self, where: str, group_id: object, error: RecordError) -> None:
        name = group_id if isinstance(group_id, str) else None
        self.last = Reject(where, name, error.reason, error.field, error.expected, _shown(error.got))
        self.counts[error.reason] += 1
        with self.path.open("a", encoding="ascii") as file:
            # ASCII with escapes: what was got may hold lone surrogates, which UTF-8 cannot.
            file.write(json.dumps(asdict(self.last)) + "\n")


def _shown(value: object) -> str:
    """One line of printable characters."""
    text = value if isinstance(value, str) and value.strip() and value.isprintable() else repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."
