"""Finished evaluations of several models on the same problems, read for a comparison."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_offgrpo.artifacts import read_manifest
from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation.evaluate import GRADED, METRICS
from megatron_offgrpo.evaluation.statistics import Comparison, CorrectArray, compare
from megatron_offgrpo.evaluation.summary import as_array

REMEDY = "give folders that `offgrpo eval` wrote"


@dataclass(frozen=True)
class Sample:
    """One graded sample without its text, which stays in the file."""

    problem_id: str
    reward: int
    tokens: int
    offset: int


@dataclass(frozen=True)
class Run:
    """One evaluation."""

    label: str
    folder: Path
    metrics: dict[str, Any]
    config: dict[str, Any]
    samples: list[Sample]
    problems: dict[str, tuple[str, str]]
    """Problem id -> (problem, reference answer), in the order of the benchmark."""
    correct_PK: CorrectArray

    def record(self, sample: Sample) -> dict[str, Any]:
        """The whole record of a sample."""
        with (self.folder / GRADED).open("rb") as file:
            file.seek(sample.offset)
            record: dict[str, Any] = json.loads(file.readline())
        return record

    def of_problem(self, name: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.problem_id == name]


@dataclass(frozen=True)
class Difference:
    """A run against the first one."""

    run: Run
    comparison: Comparison
    adjusted_p: float
    """Holm's correction for the number of runs that are compared with the first."""
    by_problem: dict[str, float]
    """Problem id -> accuracy of this run minus that of the first."""


def read_runs(folders: list[Path]) -> list[Run]:
    """The evaluations in these folders, in this order.

    Raises:
        DataError: fewer than two, one is not finished, or they are on different problems.
    """
    if len(folders) < 2:
        raise DataError("a comparison needs two evaluations", got=len(folders), remedy=REMEDY)
    runs = [_read(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]
    first = runs[0]
    for run in runs[1:]:
        if run.problems == first.problems:
            continue
        missing, more = first.problems.keys() - run.problems.keys(), run.problems.keys() - first.problems.keys()
        got = f"{len(missing)} problems are missing, {len(more)} are others"
        if not missing and not more:
            changed = [name for name, asked in run.problems.items() if asked != first.problems[name]]
            got = (
                f"{len(changed)} problems of the same name with another text or answer" if changed else "another order"
            )
        raise DataError(
            "these runs are on different problems",
            where=str(run.folder),
            expected=f"the {len(first.problems)} problems of {first.folder}",
            got=got,
            remedy="evaluate both models on one benchmark",
        )
    return runs


def differences(runs: list[Run]) -> list[Difference]:
    """Every later run against the first, paired by problem."""
    first = runs[0]
    compared = [compare(first.correct_PK, run.correct_PK) for run in runs[1:]]
    adjusted = holm([one.p_value for one in compared])
    found = []
    for run, comparison, p_value in zip(runs[1:], compared, adjusted, strict=True):
        values = run.correct_PK.mean(axis=1) - first.correct_PK.mean(axis=1)
        by_problem = dict(zip(first.problems, map(float, values), strict=True))
        found.append(Difference(run, comparison, p_value, by_problem))
    return found


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values, p_(i) max over the smaller ones of min(1, (m - i) p_(i)), i from 0 (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _labels(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-length:]) for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise DataError("one folder stands twice", got=", ".join(map(str, folders)))


def _read(folder: Path, label: str) -> Run:
    manifest = read_manifest(folder, "evaluation", remedy=REMEDY)
    samples: list[Sample] = []
    problems: dict[str, tuple[str, str]] = {}
    rewards: dict[str, list[int]] = {}
    place = folder / METRICS
    try:
        metrics = json.loads(place.read_text(encoding="utf-8"))
        place = folder / GRADED
        with place.open("rb") as file:
            offset = 0
            for line in file:
                record = json.loads(line)
                name = record["problem_id"]
                samples.append(Sample(name, record["reward"], record["tokens"], offset))
                problems.setdefault(name, (record["problem"], record["answer"]))
                rewards.setdefault(name, []).append(record["reward"])
                offset += len(line)
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise DataError(f"damaged evaluation ({cause!r})", where=str(place), remedy="evaluate again") from None
    return Run(label, folder, metrics, manifest.config, samples, problems, as_array(rewards))
