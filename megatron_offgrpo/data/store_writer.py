"""Writes the store: batches stream into Arrow while their rows are counted and fingerprinted."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_offgrpo.artifacts import Manifest, atomic_folder, write_manifest
from megatron_offgrpo.data.store_schema import SCHEMA, StoreRow, check_row, composition, record_batch, row_fingerprint
from megatron_offgrpo.errors import DataError

GROUPS_FOLDER = "groups"
REJECTED_FILE = "rejected.jsonl"
REMOVED_FILE = "removed.jsonl"
DISAGREEMENTS_FILE = "disagreements.jsonl"
LIST_FILES = (REJECTED_FILE, REMOVED_FILE, DISAGREEMENTS_FILE)
ROWS_PER_BATCH = 256

Batches = Iterable[tuple[Any, list[str]]]
"""(`pyarrow.RecordBatch` of the store's schema, the fingerprint of each of its rows)."""


@dataclass
class _Counts:
    digest: Any = field(default_factory=hashlib.sha256)
    groups: dict[str, int] = field(
        default_factory=lambda: {"total": 0, "all_positive": 0, "mixed": 0, "all_negative": 0}
    )
    tokens: dict[str, int] = field(
        default_factory=lambda: {"trajectories": 0, "truncated": 0, "prompt_tokens": 0, "response_tokens": 0}
    )
    validation: int = 0

    def add(self, batch: Any, fingerprints: list[str]) -> None:
        apart = batch["validation"].to_pylist()
        for fingerprint, is_validation in zip(fingerprints, apart, strict=True):
            self.digest.update(fingerprint.encode())
            if is_validation:
                self.digest.update(b"validation")
        self.groups["total"] += batch.num_rows
        for rewards in batch["rewards"].to_pylist():
            self.groups[composition(rewards)] += 1
        responses = batch["response_ids"].flatten()
        self.tokens["trajectories"] += len(responses)
        self.tokens["truncated"] += int(np.sum(batch["truncated"].flatten().to_numpy(zero_copy_only=False)))
        self.tokens["prompt_tokens"] += pc.sum(pc.list_value_length(batch["prompt_ids"])).as_py() or 0
        self.tokens["response_tokens"] += pc.sum(pc.list_value_length(responses)).as_py() or 0
        self.validation += sum(apart)


def write_rows(rows: Iterable[StoreRow]) -> Iterator[tuple[Any, list[str]]]:
    """Batches of 256 rows.

    Raises:
        DataError: a row whose lists have different lengths.
    """
    held: list[StoreRow] = []
    for row in rows:
        check_row(row)
        held.append(row)
        if len(held) == ROWS_PER_BATCH:
            yield record_batch(held), [row_fingerprint(one) for one in held]
            held = []
    if held:
        yield record_batch(held), [row_fingerprint(one) for one in held]


def write_batches(
    path: Path,
    batches: Batches,
    *,
    tokenizer_fingerprint: str,
    inputs: dict[str, str],
    counts: dict[str, Any],
    config: dict[str, Any],
    lists: dict[str, Path],
) -> None:
    """Writes a store that appears under `path` only when it is complete.

    Args:
        counts: read after the last batch, so the caller may fill it while they pass.
        lists: name inside the store -> file that is moved there after the last batch.

    Raises:
        DataError: no row at all.
    """
    with atomic_folder(path) as folder:
        found = _Counts()
        _write_groups(folder, _counted(batches, found))
        if found.groups["total"] == 0:
            raise DataError("no group is left to store", where=str(path))
        for name, file in lists.items():
            (folder / name).write_bytes(b"")
            with (folder / name).open("wb") as target, file.open("rb") as source:
                while block := source.read(1 << 20):
                    target.write(block)
        manifest = Manifest(
            kind="store",
            fingerprint=found.digest.hexdigest()[:32],
            inputs={"tokenizer": tokenizer_fingerprint, **inputs},
            counts={"groups": found.groups, "validation_groups": found.validation, **found.tokens, **counts},
            config=config,
        )
        write_manifest(folder, manifest)


def _counted(batches: Batches, counts: _Counts) -> Iterator[Any]:
    for batch, fingerprints in batches:
        counts.add(batch, fingerprints)
        yield batch


def _write_groups(folder: Path, batches: Iterator[Any]) -> None:
    """Streams the batches into an Arrow file, then lets `datasets` save it in its own layout."""
    import datasets

    stream = folder / "rows.arrow"
    with pa.OSFile(str(stream), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_file(str(stream)).save_to_disk(str(folder / GROUPS_FOLDER))
    finally:
        if not shown:
            datasets.enable_progress_bars()
    stream.unlink()
