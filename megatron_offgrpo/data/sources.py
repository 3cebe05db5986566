"""Inputs by name: a file, a folder of a Hugging Face dataset, or `hf:NAME` on the hub."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_offgrpo.artifacts import fingerprint_of, fingerprint_of_file
from megatron_offgrpo.data.readers import Part, read_parts, table_parts
from megatron_offgrpo.errors import DataError

HUB = "hf:"
DATASET_ROWS_PER_PART = 64
TYPED = (".parquet", ".jsonl", ".json", ".arrow")
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """One input."""

    name: str
    """As the user wrote it, without `hf:`; stands in the `file:line` of its records."""
    kind: Literal["file", "saved", "folder", "hub"]
    fingerprint: str
    split: str

    def parts(self) -> Iterator[Part]:
        """The records, in order, in fixed pieces.

        Raises:
            DataError: it cannot be read.
        """
        if self.kind == "file":
            yield from read_parts(Path(self.name))
            return
        try:
            num_rows, batches = self._rows()
            yield from table_parts(self.name, batches, DATASET_ROWS_PER_PART, num_rows)
        except DataError:
            raise
        except Exception as cause:  # `datasets` raises its own, the hub's, HTTP's and Arrow's errors
            raise DataError(f"cannot read this dataset ({_line(cause)})", where=self.name) from None

    @property
    def num_bytes(self) -> int | None:
        """Size on disk; None where it is not on this machine."""
        if self.kind == "hub":
            return None
        path = Path(self.name)
        return sum(file.stat().st_size for file in ([path] if path.is_file() else _files(path)))

    def _rows(self) -> tuple[int | None, Iterator[Any]]:
        import datasets

        if self.kind == "saved":
            found: Any = datasets.load_from_disk(self.name)
            if isinstance(found, datasets.DatasetDict):
                found = found[self.split]
            rows, num_rows = found.with_format("arrow"), len(found)
        else:
            revision = self.fingerprint if self.kind == "hub" else None
            rows = datasets.load_dataset(self.name, split=self.split, streaming=True, revision=revision)
            rows, num_rows = rows.with_format("arrow"), None
        tables = rows.iter(DATASET_ROWS_PER_PART)
        return num_rows, (batch for table in tables for batch in table.combine_chunks().to_batches())


def open_source(name: str, split: str) -> Source:
    """The input of this name; its fingerprint is that of its bytes, or the hub's commit.

    Raises:
        DataError: nothing there, or the hub does not answer.
    """
    if name.startswith(HUB):
        return _hub(name.removeprefix(HUB), split)
    path = Path(name)
    try:
        if path.is_dir():
            files = _files(path)
            if not files:
                raise DataError(
                    "an empty folder", where=name, expected="Parquet or JSON-lines files, or a saved dataset"
                )
            tables = [file for file in files if file.name.lower().endswith((".csv", ".csv.gz", ".tsv"))]
            if tables and not any(file.name.lower().removesuffix(".gz").endswith(TYPED) for file in files):
                # `datasets` guesses types there: the answer "1.50" becomes 1.5, and NA nothing.
                raise DataError(
                    "a folder of tables without types",
                    where=name,
                    expected="Parquet or JSON-lines files, or a saved dataset",
                    remedy=f"pass each file itself: --input {tables[0]}",
                )
            saved = any((path / file).is_file() for file in SAVED_DATASET_FILES)
            print_ = fingerprint_of([(str(file.relative_to(path)), fingerprint_of_file(file)) for file in files], split)
            return Source(name, "saved" if saved else "folder", print_, split)
        return Source(name, "file", fingerprint_of_file(path), split)
    except OSError as cause:
        remedy = None if path.exists() or "/" not in name or name.startswith((".", "/")) else f"on the hub: {HUB}{name}"
        raise DataError(f"cannot read the input file ({cause.strerror or cause})", where=name, remedy=remedy) from None


def _hub(name: str, split: str) -> Source:
    try:
        from huggingface_hub import HfApi

        sha = HfApi().dataset_info(name, timeout=30).sha
    except Exception as cause:  # HTTP, time-outs, wrong names, offline mode: all mean that it cannot be had
        remedy = "check the name and the network, or download it and pass the folder"
        raise DataError(f"cannot find this dataset on the hub ({_line(cause)})", where=name, remedy=remedy) from None
    return Source(name, "hub", str(sha), split)


def _files(folder: Path) -> list[Path]:
    found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if not path.name.startswith("."))


def _line(cause: BaseException) -> str:
    text = " ".join(str(cause).split())
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__
