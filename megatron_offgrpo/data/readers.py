"""Raw records in parts: each part a fixed piece of one input, the same whoever reads it.

The one reader of solutions, benchmarks and graded samples. A record that cannot be read is a `RecordError` in its
place; a file that cannot be read is a `DataError`.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from megatron_offgrpo.data.rejects import RecordError, data_error
from megatron_offgrpo.errors import DataError

EXTENSIONS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
PART_RECORDS = 256
PART_BYTES = 16 << 20
"""A part ends with the record that reaches one of these."""
MAX_LINE_BYTES = 512 << 20
"""A longer line is no record; it is passed over without being held in memory."""
BOM = b"\xef\xbb\xbf"
# The first line of a file that is one JSON array of objects, not JSON lines.
_ARRAY = re.compile(rb"\s*\[\s*([{\]]|$)")


@dataclass(frozen=True)
class Part:
    """Some records as they stand in an input; small enough for one process, and picklable."""

    name: str
    """File or dataset, as in the `file:line` of its records."""
    lines: list[tuple[int, Any]] = field(default_factory=list)
    """(number of line or record; its JSON text as bytes, the record itself, or the `RecordError` that says why there is
    none) of input that is text."""
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
            value: Any = _record(line) if isinstance(line, bytes) else line
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
    """Streams one file as parts; blank lines are no records. A JSON array alone is held in memory whole.

    Raises:
        DataError: the file is missing, unreadable, damaged, or of another extension.
    """
    if not path.name.lower().endswith(EXTENSIONS):
        raise DataError(
            "unknown kind of input file", where=str(path), expected=" or ".join(EXTENSIONS), got=path.suffix or "none"
        )
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        yield from _parquet(path) if kind == "parquet" else _csv(path) if kind == "csv" else _json(path)
    except OSError as cause:
        message = " ".join(str(cause.strerror or cause).split())
        raise DataError(f"cannot read the input file ({message})", where=str(path)) from None


def sound_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of a file of which every record counts, such as a benchmark.

    Raises:
        DataError: as `read_parts`, and at the first record that cannot be read.
    """
    for part in read_parts(path):
        for where, record in part.records():
            if isinstance(record, RecordError):
                raise data_error(where, record)
            if not isinstance(record, dict):
                raise data_error(where, RecordError("wrong type", "record", expected="an object", got=record))
            yield where, record


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


class _Text:
    """A file of text, unpacked; knows how much of it is read."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self.size = path, max(path.stat().st_size, 1)
        self._raw = stack.enter_context(path.open("rb"))
        packed = path.suffix.lower() == ".gz"
        self.stream = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw)) if packed else cast(BinaryIO, self._raw)
        self.number = 0
        """Lines read so far."""

    def parts(self, records: Iterator[tuple[int, Any, int]]) -> Iterator[Part]:
        """Parts of (number, record, bytes it took)."""
        lines: list[tuple[int, Any]] = []
        num_bytes = 0
        try:
            for number, record, taken in records:
                lines.append((number, record))
                num_bytes += taken
                if len(lines) == PART_RECORDS or num_bytes >= PART_BYTES:
                    yield Part(str(self.path), lines, share=self._raw.tell() / self.size)
                    lines, num_bytes = [], 0
        except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
            raise DataError(f"damaged gzip file ({cause})", where=f"{self.path}:{self.number + 1}") from None
        if lines:
            yield Part(str(self.path), lines, share=1.0)


def _json(path: Path) -> Iterator[Part]:
    with ExitStack() as stack:
        text = _Text(path, stack)
        yield from text.parts(_json_records(text))


def _json_records(text: _Text) -> Iterator[tuple[int, Any, int]]:
    """JSON lines, or the elements of one array of objects."""
    is_first = True
    while line := _line(text.stream):
        text.number += 1
        if isinstance(line, RecordError):
            yield text.number, line, 0
        elif line.removeprefix(BOM).strip():
            if is_first and _ARRAY.match(line.removeprefix(BOM)):
                yield from _array(text, line.removeprefix(BOM) + text.stream.read())
                return
            yield text.number, line, len(line)
            is_first = False


def _array(text: _Text, data: bytes) -> Iterator[tuple[int, Any, int]]:
    expected = "one JSON array of objects, since the file begins with ["
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as cause:
        raise DataError(f"malformed JSON ({cause})", where=str(text.path), expected=expected) from None
    yield from ((number, value, len(data) // len(values)) for number, value in enumerate(values, start=1))


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


def _record(line: bytes) -> Any:
    """The JSON value of a line, or the error that says why there is none."""
    try:
        # Joined files have a byte order mark at the head of any line.
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as cause:
        return RecordError("not UTF-8", "record", expected="UTF-8 text", got=f"{cause.reason} at byte {cause.start}")
    except (ValueError, RecursionError) as cause:
        shown = line[:80].decode("utf-8", "replace").strip()
        return RecordError(
            "malformed JSON",
            "record",
            expected="one JSON object a line, or an array of objects",
            got=f"{shown} ({cause})",
        )


def _csv(path: Path) -> Iterator[Part]:
    """Rows under a line of names; a blank cell is null, everything else is text."""
    with ExitStack() as stack:
        text = _Text(path, stack)
        # What is not UTF-8 becomes lone surrogates, so that a row can be refused without the rest.
        decoded = io.TextIOWrapper(text.stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield from text.parts(_csv_records(text, decoded))


def _csv_records(text: _Text, decoded: io.TextIOWrapper) -> Iterator[tuple[int, Any, int]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # Strict: a quotation mark that is never closed would swallow the rest of the file.
    reader = csv.reader(decoded, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            first_line, text.number = text.number + 1, reader.line_num
            if not cells:
                continue
            if not names:
                names = _column_names(cells, f"{text.path}:{first_line}")
                continue
            yield first_line, _csv_row(names, cells), sum(map(len, cells))
    except csv.Error as cause:
        raise DataError(f"damaged CSV file ({cause})", where=f"{text.path}:{text.number + 1}") from None


def _column_names(cells: list[str], where: str) -> list[str]:
    # pandas writes its index under a blank name.
    names = [cell.strip() or f"column {index}" for index, cell in enumerate(cells, start=1)]
    again = sorted({name for name in names if names.count(name) > 1})
    if again:
        raise DataError("columns of one name", where=where, expected="different names", got=", ".join(again))
    if not _is_unicode(cells):
        raise DataError("not UTF-8", where=where, expected="a line of names in UTF-8", got=ascii(cells)[:80])
    return names


def _csv_row(names: list[str], cells: list[str]) -> Any:
    if len(cells) != len(names):
        expected = f"{len(names)} ({', '.join(names)}); a cell with a comma or line break stands in quotation marks"
        return RecordError("wrong number of cells", "record", expected=expected, got=f"{len(cells)}: {cells}")
    if not _is_unicode(cells):
        return RecordError("not UTF-8", "record", expected="UTF-8 text", got=", ".join(map(ascii, cells)))
    return {name: cell if cell.strip() else None for name, cell in zip(names, cells, strict=True)}


def _is_unicode(cells: list[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True


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
