"""Problems that stand in a benchmark: shared word n-grams (Brown et al. 2020, appendix C) or equal text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_offgrpo.data import fields
from megatron_offgrpo.data.messages import is_messages, question, read_messages
from megatron_offgrpo.data.readers import sound_records
from megatron_offgrpo.data.rejects import RecordError, data_error
from megatron_offgrpo.data.text_measures import normalised, words
from megatron_offgrpo.errors import DataError

PROBLEM_FIELDS = ("problem", "question", "prompt")


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
    """(file:line, problem) of a benchmark file.

    Raises:
        DataError: an unreadable file, a record without a problem, or no record.
    """
    count = 0
    for where, record in sound_records(path):
        count += 1
        try:
            yield where, _problem(record)
        except RecordError as error:
            raise data_error(where, error) from None
    if not count:
        raise DataError("no problem in this benchmark", where=str(path))


def _problem(record: dict[str, Any]) -> str:
    name = next((name for name in PROBLEM_FIELDS if record.get(name)), None)
    if name is None:
        got = f"fields {', '.join(record)}"
        raise RecordError(
            "a benchmark record without a problem", "record", expected=" or ".join(PROBLEM_FIELDS), got=got
        )
    if is_messages(record[name]):
        return question(read_messages(record[name], name, Counter()), name)[1]
    return fields.required_text(record, name, "", may_be_blank=False)
