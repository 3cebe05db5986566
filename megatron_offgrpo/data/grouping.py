"""Rows of one solution each to groups: by the hash of the problem through files on disk, with flat memory."""

import heapq
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from megatron_offgrpo.artifacts import atomic_folder, write_json_atomically
from megatron_offgrpo.data.importers import form_of, meets
from megatron_offgrpo.data.readers import Part, read_parts
from megatron_offgrpo.data.rejects import RecordError, Reject, reject_of
from megatron_offgrpo.data.row_forms import ROW_FORMS, read_row
from megatron_offgrpo.data.sources import Source
from megatron_offgrpo.progress import progress

GROUPS_FILE, REJECTS_FILE, COUNTS_FILE = "groups.jsonl", "rejected.jsonl", "counts.json"
BUCKET_BYTES = 32 << 20
"""Of input, compressed or not; a bucket is held in memory once, and text takes a few times that."""
MAX_BUCKETS = 256


def has_rows(source: Source, form: str) -> bool:
    """Whether the source has rows of one solution each: as told, or by its first readable record."""
    if form != "auto":
        return form in ROW_FORMS
    for part in source.parts():
        for _, record in part.records():
            if isinstance(record, dict):
                return form_of(record) in ROW_FORMS
    return False


def grouped_parts(source: Source, folder: Path, conditions: list[tuple[list[str], str]], form: str) -> Iterator[Part]:
    """The parts of the source's groups, in the order in which their problems first appear.

    `folder` keeps the grouped file, so that a second process or a second start does not group again.
    """
    if not (folder / COUNTS_FILE).is_file():
        with atomic_folder(folder) as temporary:
            _group(source, temporary, conditions, form)
    for part in read_parts(folder / GROUPS_FILE):
        yield replace(part, grouped=True)


def grouping_rejects(folder: Path) -> Iterator[Reject]:
    """The rows that the grouping left out."""
    with (folder / REJECTS_FILE).open(encoding="ascii") as file:
        for line in file:
            yield Reject(**json.loads(line))


def grouping_counts(folder: Path) -> dict[str, Any]:
    """`rows`, `not_asked_for` among them, and `ignored_fields`: name -> rows."""
    counts: dict[str, Any] = json.loads((folder / COUNTS_FILE).read_text("utf-8"))
    return counts


def _group(source: Source, folder: Path, conditions: list[tuple[list[str], str]], form: str) -> None:
    num_bytes = source.num_bytes
    num_buckets = MAX_BUCKETS if num_bytes is None else min(MAX_BUCKETS, 1 + num_bytes // BUCKET_BYTES)
    buckets = [folder / f"bucket-{index:03d}.jsonl" for index in range(num_buckets)]
    counts = _scatter(source, buckets, folder / REJECTS_FILE, conditions, form)
    with (folder / REJECTS_FILE).open("a", encoding="ascii") as rejects:
        for bucket in buckets:
            _gather(bucket, rejects)
    with ExitStack() as stack, (folder / GROUPS_FILE).open("w", encoding="ascii") as out:
        files = [stack.enter_context(bucket.open(encoding="ascii")) for bucket in buckets]
        for line in heapq.merge(*files, key=lambda line: int(line[: line.index("\t")])):
            out.write(line[line.index("\t") + 1 :])
    for bucket in buckets:
        bucket.unlink()
    write_json_atomically(folder / COUNTS_FILE, counts)


def _scatter(source: Source, buckets: list[Path], rejects: Path, conditions: Any, form: str) -> dict[str, Any]:
    """Each row into the bucket of its problem, with its number and place."""
    number, counts, ignored, done = 0, Counter[str](), Counter[str](), 0.0
    with ExitStack() as stack:
        files = [stack.enter_context(bucket.open("w", encoding="ascii")) for bucket in buckets]
        rejected = stack.enter_context(rejects.open("w", encoding="ascii"))
        advance = stack.enter_context(progress(f"group {source.name} (percent)", 100))
        for part in source.parts():
            for where, record in part.records():
                counts["rows"] += 1
                if not meets(record, conditions):
                    counts["not_asked_for"] += 1
                    continue
                number += 1
                try:
                    key, row = read_row(record, form, ignored)
                except RecordError as error:
                    _reject(rejected, where, error)
                    continue
                files[zlib.crc32(key.encode()) % len(files)].write(json.dumps([number, key, where, row]) + "\n")
            advance(100 * (part.share - done))
            done = part.share
    return {**counts, "ignored_fields": dict(ignored)}


def _reject(file: TextIO, where: str, error: RecordError) -> None:
    file.write(json.dumps(asdict(reject_of(where, None, error))) + "\n")


def _gather(bucket: Path, rejects: TextIO) -> None:
    """Rewrites a bucket as lines `number of the first row TAB [place, group]`, ascending.

    A group has one reference answer, though not every row need give it; a row with another one is left out.
    """
    groups: dict[str, tuple[int, str, dict[str, Any]]] = {}
    with bucket.open(encoding="ascii") as file:
        for line in file:
            number, key, where, row = json.loads(line)
            row["trajectories"][0]["sample_id"] = where
            if key not in groups:
                groups[key] = number, where, row
                continue
            _, first, group = groups[key]
            if row["answer"] and group["answer"] and row["answer"] != group["answer"]:
                expected = f"{group['answer']}, as the rows before since {first}"
                _reject(rejects, where, RecordError("another answer", "answer", expected=expected, got=row["answer"]))
                continue
            group["answer"] = group["answer"] or row["answer"]
            group["trajectories"] += row["trajectories"]
    with bucket.open("w", encoding="ascii") as file:
        for number, where, row in groups.values():
            file.write(f"{number}\t{json.dumps([where, row])}\n")
