"""Problems that stand in a benchmark: shared word n-grams (Brown et al. 2020, appendix C) or equal text."""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_offgrpo.data.readers import EXTENSIONS, read_parts
from megatron_offgrpo.data.rejects import RecordError
from megatron_offgrpo.data.text_measures import normalised, words
from megatron_offgrpo.errors import DataError

PROBLEM_FIELDS = ("problem", "question", "prompt")
ARRAYS = (".json", ".json.gz")


@dataclass(frozen=True)
class Contamination:
    """Where a problem stands in a benchmark."""

    partner: str
    """file:line of the benchmark."""
    overlap: str
    """The shared n-gram, or `the whole text`."""


class BenchmarkIndex:
    """All n-grams of the problems of some benchmark files; benchmark problems of fewer than n words count whole.

    Raises:
        DataError: a file that cannot be read or holds no problem.
    """

    def __init__(self, paths: Sequence[str], num_words: int) -> None:
        self.num_words = num_words
        self._texts: dict[str, str] = {}
        self._grams: dict[str, str] = {}
        for path in paths:
            for where, problem in read_problems(Path(path)):
                self._texts.setdefault(normalised(problem), where)
                for gram in self._ngrams(problem):
                    self._grams.setdefault(gram, where)

    def find(self, problem: str) -> Contamination | None:
        """The first overlap of a problem with a benchmark; None where there is none."""
        if (where := self._texts.get(normalised(problem))) is not None:
            return Contamination(where, "the whole text")
        for gram in self._ngrams(problem):
            if (where := self._grams.get(gram)) is not None:
                return Contamination(where, gram)
        return None

    def _ngrams(self, text: str) -> Iterator[str]:
        found = words(text)
        for at in range(len(found) - self.num_words + 1):
            yield " ".join(found[at : at + self.num_words])


def read_problems(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, problem) of a benchmark: .jsonl, .jsonl.gz, .parquet, or one JSON array (.json, .json.gz).

    Raises:
        DataError: an unreadable file, a record without a problem, or no record.
    """
    if not path.name.endswith((*EXTENSIONS, *ARRAYS)):
        expected = " or ".join((*EXTENSIONS, *ARRAYS))
        raise DataError("unknown kind of benchmark file", where=str(path), expected=expected)
    found = _array(path) if path.name.endswith(ARRAYS) else (one for part in read_parts(path) for one in part.records())
    count = 0
    for where, record in found:
        count += 1
        yield where, _problem(record, where)
    if not count:
        raise DataError("no problem in this benchmark", where=str(path))


def _problem(record: Any, where: str) -> str:
    if isinstance(record, RecordError):
        raise DataError(record.reason, where=where, expected=record.expected, got=record.got)
    value = (
        next((record[name] for name in PROBLEM_FIELDS if record.get(name)), None) if isinstance(record, dict) else None
    )
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")  # a list of chat messages
    if not isinstance(value, str):
        raise DataError("a benchmark record without a problem", where=where, expected=" or ".join(PROBLEM_FIELDS))
    return value


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        values = json.loads(data)
    except (OSError, EOFError, ValueError, RecursionError) as cause:
        raise DataError(f"unreadable benchmark ({cause})", where=str(path)) from None
    if not isinstance(values, list):
        raise DataError("not a benchmark", where=str(path), expected="a JSON array", got=type(values).__name__)
    yield from ((f"{path}:{index}", value) for index, value in enumerate(values, start=1))
