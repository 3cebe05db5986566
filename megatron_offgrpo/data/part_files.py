"""Finished parts on disk: the rows in Arrow, and beside them what was left out and counted."""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_offgrpo.artifacts import write_json_atomically
from megatron_offgrpo.data.near_duplicates import NUM_PERMUTATIONS, signatures
from megatron_offgrpo.data.part_worker import PartResult
from megatron_offgrpo.data.store_schema import SCHEMA, composition, record_batch, row_fingerprint
from megatron_offgrpo.data.text_measures import hash_64, normalised

COMPOSITIONS = ("all_positive", "mixed", "all_negative")
NUM_PARTS_FILE = "parts.json"
OPEN_PARTS = 64
_EXTRA = {
    "row_fingerprint": pa.string(),
    "record": pa.int32(),
    "id_hash": pa.uint64(),
    "problem_hash": pa.uint64(),
    "composition": pa.int8(),
    "signature": pa.list_(pa.uint32(), NUM_PERMUTATIONS),
}
"""Columns of a part beside the store's: what decides over all parts."""


@dataclass(frozen=True)
class PartNotes:
    """Everything of a part but its rows."""

    rejected: list[tuple[int, dict[str, Any]]]
    removed: list[tuple[int, dict[str, Any]]]
    disagreements: list[tuple[int, dict[str, Any]]]
    counts: dict[str, int]
    ignored_fields: dict[str, int]
    statuses: dict[str, int]
    label_sources: dict[str, int]
    compared: dict[str, int]


@dataclass(frozen=True)
class PartFolder:
    """The parts of one request; a part is finished when its notes are there, which are written last."""

    path: Path

    def is_finished(self, part: int) -> bool:
        return self._notes(part).is_file()

    @property
    def num_parts(self) -> int | None:
        """How many there are in all; None until the input was once read to its end."""
        file = self.path / NUM_PARTS_FILE
        return json.loads(file.read_text("utf-8"))["num_parts"] if file.is_file() else None

    @property
    def first_parts(self) -> list[int]:
        """Number of the first part of each source, once the input was read."""
        found: list[int] = json.loads((self.path / NUM_PARTS_FILE).read_text("utf-8"))["first_parts"]
        return found

    def set_num_parts(self, number: int, first_parts: list[int]) -> None:
        write_json_atomically(self.path / NUM_PARTS_FILE, {"num_parts": number, "first_parts": first_parts})

    def write(self, part: int, result: PartResult, *, with_signatures: bool) -> None:
        """Writes a part so that it is finished or absent whenever the process is killed."""
        rows = [row for _, row in result.rows]
        batch = record_batch(rows)
        problems = [row.problem for row in rows]
        minhash = signatures(problems if with_signatures else []).reshape(-1)
        signature = (
            pa.FixedSizeListArray.from_arrays(pa.array(minhash), NUM_PERMUTATIONS)
            if with_signatures
            else pa.nulls(len(rows), _EXTRA["signature"])
        )
        extra = {
            "row_fingerprint": [row_fingerprint(row) for row in rows],
            "record": [index for index, _ in result.rows],
            "id_hash": [hash_64(row.group_id) for row in rows],
            "problem_hash": [hash_64(normalised(row.problem)) for row in rows],
            "composition": [COMPOSITIONS.index(composition(row.rewards)) for row in rows],
        }
        arrays = [pa.array(values, _EXTRA[name]) for name, values in extra.items()]
        schema = pa.schema([*SCHEMA, *(pa.field(name, kind) for name, kind in _EXTRA.items())])
        whole = pa.RecordBatch.from_arrays([*batch.columns, *arrays, signature], schema=schema)
        temporary = self._rows(part).with_suffix(f".{os.getpid()}.tmp")
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(whole)
        os.replace(temporary, self._rows(part))
        notes = PartNotes(
            result.rejected,
            result.removed,
            result.disagreements,
            dict(result.counts),
            dict(result.ignored_fields),
            dict(result.labels.statuses),
            dict(result.labels.labels),
            dict(result.labels.compared),
        )
        temporary = self._notes(part).with_suffix(f".{os.getpid()}.tmp")
        # ASCII with escapes: the name of a rejected group may hold lone surrogates, which UTF-8 cannot.
        temporary.write_text(json.dumps(vars(notes)), encoding="ascii")
        os.replace(temporary, self._notes(part))

    def rows(self, part: int) -> Any:
        """`pyarrow.RecordBatch` of a finished part, memory-mapped, with the extra columns."""
        return _open(str(self._rows(part)))

    def notes(self, part: int) -> PartNotes:
        return PartNotes(**json.loads(self._notes(part).read_text("utf-8")))

    def _rows(self, part: int) -> Path:
        return self.path / f"part-{part:06d}.arrow"

    def _notes(self, part: int) -> Path:
        return self.path / f"part-{part:06d}.json"


@lru_cache(maxsize=OPEN_PARTS)
def _open(path: str) -> Any:
    return pa.ipc.open_file(pa.memory_map(path)).get_batch(0)


def column(batch: Any, name: str, dtype: Any) -> Any:
    """A column of numbers as a NumPy array."""
    return np.asarray(batch[name].to_numpy(zero_copy_only=False), dtype=dtype)
