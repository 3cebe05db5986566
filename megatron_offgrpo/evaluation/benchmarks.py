"""Benchmarks: a file of questions with their reference answers."""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_offgrpo.errors import DataError

PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "gold", "final_answer")
ID_FIELDS = ("id", "unique_id", "problem_id")
GSM8K_MARK = "####"
"""GSM8K's answers are worked solutions; the final answer follows this mark."""
FORM = "records with `problem` (or question, prompt), `answer` and an optional `id`"


@dataclass(frozen=True)
class Question:
    """One problem of a benchmark."""

    problem_id: str
    problem: str
    answer: str


def load_benchmark(path: Path) -> list[Question]:
    """The questions of a benchmark file, in its order: .jsonl, .json (an array), either also .gz, or .parquet.

    Raises:
        DataError: unreadable file, a record without problem or answer, a repeated id, or no record at all.
    """
    path = Path(path)
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for where, record in _records(path):
        if not isinstance(record, dict):
            raise DataError("not a record", where=where, expected=FORM, got=type(record).__name__)
        problem = _text(record, PROBLEM_FIELDS, where)
        answer = _text(record, ANSWER_FIELDS, where).rpartition(GSM8K_MARK)[2].strip()
        found = [record[name] for name in ID_FIELDS if record.get(name) is not None]
        problem_id = str(found[0]) if found else f"{len(questions)}"
        if problem_id in seen:
            raise DataError(f"id {problem_id!r} stands twice", where=where, got=f"also at {seen[problem_id]}")
        seen[problem_id] = where
        questions.append(Question(problem_id, problem, answer))
    if not questions:
        raise DataError("an empty benchmark", where=str(path), expected=FORM)
    return questions


def _text(record: dict[str, Any], names: tuple[str, ...], where: str) -> str:
    for name in names:
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            return value
        if value is not None:
            got = "an empty text" if isinstance(value, str) else type(value).__name__
            raise DataError(f"field `{name}` is not a text", where=where, expected="a text or a number", got=got)
    raise DataError(f"no `{names[0]}`", where=where, expected=FORM, got=f"fields {', '.join(map(str, record))}")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line or file, record N; record) of each record."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            rows = pyarrow.parquet.read_table(path).to_pylist()
            yield from ((f"{path}, row {index}", row) for index, row in enumerate(rows))
            return
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, pyarrow.ArrowException) as cause:
        raise DataError(f"unreadable benchmark ({cause})", where=str(path), expected=FORM) from None
    if text.lstrip().startswith("["):
        values = _parse(text, str(path))
        yield from ((f"{path}, record {index}", value) for index, value in enumerate(values))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as cause:
        raise DataError(f"not JSON ({cause})", where=where, expected=FORM) from None
