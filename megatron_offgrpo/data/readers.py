"""Records of JSON-lines and Parquet files, streamed; what is no record comes out as the error that says why."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.errors import DataError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".parquet")
PARQUET_ROWS = 256

Entry = tuple[str, Any, float]
"""file:line, the record or its `RecordError`, and the share of the file read so far (0 to 1)."""


def read_records(path: Path) -> Iterator[Entry]:
    """Streams the records of one file; blank lines are no records.

    Raises:
        DataError: the file is missing, unreadable, damaged, or of another extension.
    """
    if not path.name.endswith(EXTENSIONS):
        raise DataError(
            "unknown kind of input file", where=str(path), expected=" or ".join(EXTENSIONS), got=path.suffix or "none"
        )
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        yield from _parquet(path) if path.suffix == ".parquet" else _json_lines(path, size)
    except OSError as cause:
        raise DataError(f"cannot read the input file ({cause.strerror or cause})", where=str(path)) from None


def _json_lines(path: Path, size: int) -> Iterator[Entry]:
    number = 0
    with path.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        while True:
            try:
                line = lines.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile) as cause:
                raise DataError(f"damaged gzip file ({cause})", where=f"{path}:{number + 1}") from None
            if not line:
                return
            number += 1
            if line.strip():
                yield f"{path}:{number}", _record(line, first=number == 1), raw.tell() / size


def _record(line: bytes, *, first: bool) -> Any:
    """The JSON value of a line, or the error that says why there is none."""
    try:
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as cause:
        return RecordError("not UTF-8", "record", expected="UTF-8 text", got=f"{cause.reason} at byte {cause.start}")
    except (ValueError, RecursionError) as cause:
        shown = line[:80].decode("utf-8", "replace").strip()
        return RecordError("malformed JSON", "record", expected="one JSON object a line", got=f"{shown} ({cause})")


def _parquet(path: Path) -> Iterator[Entry]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(PARQUET_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        record: Any = batch.slice(index, 1).to_pylist()[0]
                    except UnicodeDecodeError as cause:
                        record = RecordError("not UTF-8", "record", expected="UTF-8 text", got=str(cause))
                    yield f"{path}:{number}", record, number / total
    except pa.ArrowException as cause:
        raise DataError(f"damaged Parquet file ({cause})", where=f"{path}:{number + 1}") from None
