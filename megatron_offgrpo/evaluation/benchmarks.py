"""Benchmarks: questions with their reference answers, from a file, by name from a data folder, or from the hub."""

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megatron_offgrpo.data import fields
from megatron_offgrpo.data.messages import is_messages, question, read_messages
from megatron_offgrpo.data.option_columns import option_columns
from megatron_offgrpo.data.readers import EXTENSIONS, sound_records
from megatron_offgrpo.data.rejects import RecordError, data_error
from megatron_offgrpo.data.summary import listing
from megatron_offgrpo.errors import ConfigError, DataError
from megatron_offgrpo.evaluation.benchmark_table import TABLE, Benchmark, HubSource
from megatron_offgrpo.evaluation.options import OPTION_FIELDS, options_and_letter, with_options
from megatron_offgrpo.progress import say

PROBLEM_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "gold", "final_answer")
ID_FIELDS = ("id", "unique_id", "problem_id")
KNOWN_FIELDS = (PROBLEM_FIELDS, ANSWER_FIELDS, ID_FIELDS, OPTION_FIELDS)
"""The first name that a record has is used, for each of problem, answer, id and options."""
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
    except RecordError as error:
        raise data_error(where, error) from None
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
        yield from sound_records(files[0])
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
    """The questions of a benchmark file, in its order; says which fields are not used.

    Raises:
        DataError: unreadable file, a record that cannot be used as a whole, a repeated id, or no record at all.
    """
    path = Path(path)
    questions: list[Question] = []
    seen: dict[str, str] = {}
    ignored: Counter[str] = Counter()
    for where, record in sound_records(path):
        try:
            one = _question(record, len(questions), ignored)
        except RecordError as error:
            raise data_error(where, error) from None
        if one.problem_id in seen:
            raise DataError(f"id {one.problem_id!r} stands twice", where=where, got=f"also at {seen[one.problem_id]}")
        seen[one.problem_id] = where
        questions.append(one)
    if not questions:
        raise DataError("an empty benchmark", where=str(path), expected=FORM)
    if ignored:
        say(f"{path}: fields that are not used: {listing(ignored)}")
    return questions


def _question(record: dict[str, Any], number: int, ignored: Counter[str]) -> Question:
    names = [next((one for one in known if record.get(one) not in (None, [], {})), "") for known in KNOWN_FIELDS]
    problem_field, answer_field, id_field, option_field = names
    if not problem_field or not answer_field:
        missing = ANSWER_FIELDS if problem_field else PROBLEM_FIELDS
        raise RecordError("missing field", missing[0], expected=FORM, got=f"fields {', '.join(map(str, record))}")
    columns = next(iter(option_columns(record)), {})
    fields.account(record, (*names, "context", *columns), "", ignored)
    problem = _problem(record, problem_field, ignored)
    context = fields.text(record, "context", "")
    if context is not None and context.strip():
        problem = f"{context}\n\n{problem}"
    problem_id = fields.identifier(record, id_field) if id_field else str(number)
    if not option_field and not columns:
        return Question(problem_id, problem, fields.answer(record, answer_field, "", required=True))
    options, letter = options_and_letter(record, option_field, columns, answer_field)
    return Question(problem_id, with_options(problem, options), letter, len(options))


def _problem(record: dict[str, Any], field: str, ignored: Counter[str]) -> str:
    if not is_messages(record[field]):
        return fields.required_text(record, field, "", may_be_blank=False)
    system, problem = question(read_messages(record[field], field, ignored), field)
    if system is not None:
        expected = "a question alone; pass the system text with --system"
        raise RecordError("field without a use", field, expected=expected, got=system)
    return problem
