"""Benchmarks: questions with their reference answers, from a file, by name from a data folder, or from the hub."""

import csv
import difflib
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_offgrpo.data.fields import plain_number
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.benchmark_table import TABLE, Benchmark, HubSource
from megatron_offgrpo.progress import say

PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "gold", "final_answer")
ID_FIELDS = ("id", "unique_id", "problem_id")
GSM8K_MARK = "####"
"""GSM8K's answers are worked solutions; the final answer follows this mark."""
EXTENSIONS = (".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".json.gz")
FORM = "records with `problem` (or question, prompt), `answer` and an optional `id`"


@dataclass(frozen=True)
class Question:
    """One problem of a benchmark."""

    problem_id: str
    problem: str
    """With its lettered options and what to answer, where it has options."""
    answer: str
    choices: int = 0
    """Number of options, whose letters are the answers; 0 for an open question."""


def find_benchmark(name: str, data_dir: Path | None = None) -> list[Question]:
    """The questions of a file, or of a named benchmark: from `data_dir`, or without one from the hub.

    Raises:
        ConfigError: neither a file nor a known name.
        DataError: the records cannot be read.
    """
    if name in TABLE:
        return load_named(name, data_dir)
    if not Path(name).is_file():
        near = difflib.get_close_matches(name, TABLE, n=1)
        raise ConfigError(
            "neither a benchmark's name nor a file",
            where="--benchmark",
            expected=f"a file, or one of {', '.join(TABLE)}",
            got=name,
            remedy=f"did you mean {near[0]}?" if near else None,
        )
    return load_benchmark(Path(name))


def load_named(name: str, data_dir: Path | None) -> list[Question]:
    """The questions of a benchmark of the table, in their published order.

    Raises:
        DataError: no such file, or a record that does not have the benchmark's form.
    """
    benchmark = TABLE[name]
    records = list(_hub_records(benchmark) if data_dir is None else _local_records(benchmark, Path(data_dir)))
    questions: list[Question] = []
    seen: set[str] = set()
    for where, record in records[slice(*benchmark.rows)] if benchmark.rows and data_dir else records:
        question = _read(benchmark, record, where, len(questions))
        if question.problem_id in seen:
            raise DataError(f"id {question.problem_id!r} stands twice", where=where)
        seen.add(question.problem_id)
        questions.append(question)
    if not questions:
        raise DataError("an empty benchmark", where=name)
    if len(questions) != benchmark.num_problems:
        say(f"{name}: {len(questions)} problems here, {benchmark.num_problems} as published")
    return questions


def _read(benchmark: Benchmark, record: Any, where: str, number: int) -> Question:
    try:
        asked = benchmark.read(record)
    except (KeyError, IndexError, TypeError, ValueError) as cause:
        got = f"fields {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
        raise DataError(f"not a record of {benchmark.title} ({cause!r})", where=where, got=got) from None
    if not asked.problem.strip() or not asked.answer.strip():
        raise DataError("a record without problem or answer", where=where, got=f"fields {', '.join(map(str, record))}")
    letters = ascii_uppercase[: len(asked.options)]
    if asked.options and asked.answer not in letters:
        raise DataError("the answer is none of the options", where=where, expected=", ".join(letters), got=asked.answer)
    problem = with_options(asked.problem, asked.options) if asked.options else asked.problem
    return Question(asked.problem_id or str(number), problem, asked.answer, len(asked.options))


def with_options(problem: str, options: tuple[str, ...]) -> str:
    """The question, its options with letters, and how to answer."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return f"{problem}\n\n" + "\n".join(lines) + "\n\nAnswer with the letter of the right option in \\boxed{}."


def _local_records(benchmark: Benchmark, data_dir: Path) -> Iterator[tuple[str, Any]]:
    files = sorted(
        path for path in data_dir.glob(f"{benchmark.file}.*") if path.is_file() and path.name.endswith(EXTENSIONS)
    )
    folder = data_dir / benchmark.file
    if len(files) > 1 or (files and folder.is_dir()):
        raise DataError(
            "several files of one benchmark", where=str(data_dir), expected="one", got=[f.name for f in files]
        )
    if files:
        yield from _records(files[0])
    elif folder.is_dir():
        for source in benchmark.hub:
            yield from _dataset_records(str(folder), source)
    else:
        raise DataError(
            "no such benchmark in the data folder",
            where=str(data_dir),
            expected=f"{benchmark.file}.* ({', '.join(EXTENSIONS)}) or a folder {benchmark.file}/",
        )


def _hub_records(benchmark: Benchmark) -> Iterator[tuple[str, Any]]:
    for source in benchmark.hub:
        yield from _dataset_records(source.path, source)


def _dataset_records(path: str, source: HubSource) -> Iterator[tuple[str, Any]]:
    """Records of a dataset by `datasets`, from the hub or a copy of it in a folder."""
    import datasets

    try:
        config = source.config
        if Path(path).is_dir() and config not in datasets.get_dataset_config_names(path):
            config = None
        dataset = datasets.load_dataset(path, config, split=source.split)
    except Exception as cause:  # datasets and the hub's client raise errors of many kinds
        raise DataError(
            f"cannot load the dataset ({str(cause).strip().splitlines()[0] if str(cause) else type(cause).__name__})",
            where=path,
            remedy="copy its files into a folder and pass --data-dir",
        ) from None
    yield from ((f"{path}, row {index}", dict(record)) for index, record in enumerate(dataset))


def load_benchmark(path: Path) -> list[Question]:
    """The questions of a benchmark file, in its order: .jsonl, .json (an array), either also .gz, .parquet or .csv.

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
            return plain_number(value)
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
    if name.endswith(".csv"):
        yield from ((f"{path}, row {index}", row) for index, row in enumerate(csv.DictReader(io.StringIO(text))))
        return
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
