"""Raw records in parts: each part a fixed piece of one input, the same whoever reads it."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.errors import DataError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".parquet")
PART_RECORDS = 256
PART_BYTES = 16 << 20
"""A part ends with the record that reaches one of these."""
MAX_LINE_BYTES = 512 << 20
"""A longer line is no record; it is passed over without being held in memory."""


@dataclass(frozen=True)
class Part:
    """Some records as they stand in an input; small enough for one process, and picklable."""

    name: str
    """File or dataset, as in the `file:line` of its records."""
    lines: list[tuple[int, bytes | RecordError]] = field(default_factory=list)
    """(line number, JSON text or why there is none) of JSON-lines input."""
    rows: Any = None
    """`pyarrow.RecordBatch` of other input."""
    first_row: int = 1
    share: float = 0.0
    """How much of the input is read with this part (0 to 1)."""
    grouped: bool = False
    """The lines are `[place, record]` of `data.grouping`."""

    def records(self) -> Iterator[tuple[str, Any]]:
        """(file:line, record or its `RecordError`), in order."""
        for number, line in self.lines:
            value: Any = line if isinstance(line, RecordError) else _record(line, first=number == 1)
            if self.grouped:
                yield tuple(value)
            else:
                yield f"{self.name}:{number}", value
        for index in range(0 if self.rows is None else self.rows.num_rows):
            try:
                record: Any = self.rows.slice(index, 1).to_pylist()[0]
            except (UnicodeDecodeError, ValueError, OverflowError, pa.ArrowException) as cause:
                record = RecordError("unreadable row", "record", expected="text and numbers", got=str(cause))
            yield f"{self.name}:{self.first_row + index}", record


def read_parts(path: Path) -> Iterator[Part]:
    """Streams one file as parts; blank lines are no records.

    Raises:
        DataError: the file is missing, unreadable, damaged, or of another extension.
    """
    if not path.name.endswith(EXTENSIONS):
        raise DataError(
            "unknown kind of input file", where=str(path), expected=" or ".join(EXTENSIONS), got=path.suffix or "none"
        )
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        yield from _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    except OSError as cause:
        message = " ".join(str(cause.strerror or cause).split())
        raise DataError(f"cannot read the input file ({message})", where=str(path)) from None


def table_parts(name: str, batches: Iterator[Any], rows_per_part: int, num_rows: int | None) -> Iterator[Part]:
    """Parts of `rows_per_part` rows from a stream of Arrow batches of any size."""
    held: list[Any] = []
    first = 1

    def part(batch: Any) -> Part:
        whole = batch.combine_chunks().to_batches()[0]
        return Part(name, rows=whole, first_row=first, share=(first - 1 + batch.num_rows) / (num_rows or 1 << 62))

    for batch in batches:
        held.append(batch)
        table = pa.Table.from_batches(held)
        while table.num_rows >= rows_per_part:
            yield part(table.slice(0, rows_per_part))
            first += rows_per_part
            table = table.slice(rows_per_part)
        held = table.to_batches()
    if held and (rest := pa.Table.from_batches(held)).num_rows:
        yield part(rest)


def _json_lines(path: Path) -> Iterator[Part]:
    size = max(path.stat().st_size, 1)
    number, num_bytes = 0, 0
    lines: list[tuple[int, bytes | RecordError]] = []
    with path.open("rb") as raw:
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw
        while True:
            try:
                line = _line(stream)
            except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
                raise DataError(f"damaged gzip file ({cause})", where=f"{path}:{number + 1}") from None
            if not line:
                break
            number += 1
            if isinstance(line, RecordError) or line.strip():
                lines.append((number, line))
                num_bytes += 0 if isinstance(line, RecordError) else len(line)
            if len(lines) == PART_RECORDS or num_bytes >= PART_BYTES:
                yield Part(str(path), lines, share=raw.tell() / size)
                lines, num_bytes = [], 0
    if lines:
        yield Part(str(path), lines, share=1.0)


def _line(stream: BinaryIO) -> bytes | RecordError:
    """The next line, empty at the end of the file; a line over the limit is read to its end and left out."""
    line = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) <= MAX_LINE_BYTES:
        return line
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = stream.readline(1 << 20)
        length += len(line)
    return RecordError(
        "line too long", "record", expected=f"at most {MAX_LINE_BYTES} bytes a line", got=f"{length} bytes"
    )


def _record(line: bytes, *, first: bool) -> Any:
    """The JSON value of a line, or the error that says why there is none."""
    try:
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as cause:
        return RecordError("not UTF-8", "record", expected="UTF-8 text", got=f"{cause.reason} at byte {cause.start}")
    except (ValueError, RecursionError) as cause:
        shown = line[:80].decode("utf-8", "replace").strip()
        return RecordError("malformed JSON", "record", expected="one JSON object a line", got=f"{shown} ({cause})")


def _parquet(path: Path) -> Iterator[Part]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            num_rows = file.metadata.num_rows
            groups = (file.metadata.row_group(index) for index in range(file.metadata.num_row_groups))
            row_bytes = sum(group.total_byte_size for group in groups) / max(num_rows, 1)
            # From the file's own figures, so that the parts do not depend on who reads it.
            rows_per_part = max(1, min(PART_RECORDS, int(PART_BYTES // max(row_bytes, 1))))
            yield from table_parts(str(path), file.iter_batches(rows_per_part), rows_per_part, num_rows)
    except pa.ArrowException as cause:
        raise DataError(f"damaged Parquet file ({' '.join(str(cause).split())})", where=str(path)) from None
