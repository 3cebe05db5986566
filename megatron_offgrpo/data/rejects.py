"""What is left out: each record or trajectory listed with its place and reason."""

from dataclasses import dataclass

from megatron_offgrpo.errors import DataError

MAX_SHOWN_CHARACTERS = 200


class RecordError(Exception):
    """A record cannot be used.

    Args:
        reason: one of a few fixed phrases, by which rejected records are counted.
        field: path inside the record, such as `trajectories[2].reward`.
    """

    def __init__(self, reason: str, field: str, *, expected: str, got: object) -> None:
        super().__init__(reason)
        self.reason, self.field, self.expected = reason, field, expected
        self.got = _shown(got)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return _rebuilt, (self.reason, self.field, self.expected, self.got)


def _rebuilt(reason: str, field: str, expected: str, got: str) -> RecordError:
    return RecordError(reason, field, expected=expected, got=got)


@dataclass(frozen=True)
class Reject:
    """One line of `rejected.jsonl`: a record that cannot be used."""

    where: str
    """file:line (file:row of a Parquet file), 1-based."""
    group_id: str | None
    reason: str
    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.reason}; expected {self.expected}; got {self.got}"


@dataclass(frozen=True)
class Removal:
    """One line of `removed.jsonl`: a group, or a trajectory of one, that a filter leaves out."""

    where: str
    """file:line of the group."""
    group_id: str
    trajectory: int | None
    """Its place in the input's group, from 0; None for the whole group."""
    reason: str
    detail: str
    """What was found, and what was asked for."""
    partner: str | None = None
    """file:line of what it duplicates or is contained in."""


def reject_of(where: str, group_id: object, error: RecordError) -> Reject:
    """The line for a record that cannot be used."""
    name = group_id if isinstance(group_id, str) else None
    return Reject(where, name, error.reason, error.field, error.expected, error.got)


def data_error(where: str, error: RecordError) -> DataError:
    """The error for a file that may hold no such record."""
    what = error.reason if error.field == "record" else f"{error.reason}: {error.field}"
    return DataError(what, where=where, expected=error.expected, got=error.got)


def _shown(value: object) -> str:
    """One line of printable characters."""
    if isinstance(value, str):
        short: object = value[: MAX_SHOWN_CHARACTERS + 1]
    else:
        short = value
    try:
        text = short if isinstance(short, str) and short.strip() and short.isprintable() else repr(short)
    except (ValueError, RecursionError) as cause:  # integers of thousands of digits, lists of thousands of levels
        text = f"{type(value).__name__} ({cause})"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."
