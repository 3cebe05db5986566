"""The figures of one evaluation, from its graded samples."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_offgrpo.errors import DataError
from megatron_offgrpo.evaluation import statistics
from megatron_offgrpo.evaluation.statistics import CorrectArray

QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass
class Tally:
    """What `summarise` needs of the graded samples; texts are not kept."""

    lenient: dict[str, list[int]] = field(default_factory=dict)
    strict: dict[str, list[int]] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    empty: list[bool] = field(default_factory=list)
    no_box: list[bool] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """Counts one record of `graded.jsonl`."""
        self.lenient.setdefault(record["problem_id"], []).append(record["reward"])
        if "strict" in record:  # absent where only one score was kept
            self.strict.setdefault(record["problem_id"], []).append(record["strict"])
            self.no_box.append(not record["has_box"])
        self.tokens.append(record["tokens"])
        self.truncated.append(record["finish_reason"] == "length")
        self.empty.append(not record.get("text", "x").strip())
        self.statuses.append(record["status"])


def summarise(graded: Iterable[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy with both intervals, pass@k, lengths, and counts of what went wrong."""
    tally = Tally()
    for record in graded:
        tally.add(record)
    return summary_of(tally, seed)


def summary_of(tally: Tally, seed: int) -> dict[str, Any]:
    """The figures of `metrics.json`; those of the lenient score stand at the top, of the strict one under `strict`."""
    lenient_PK = as_array(tally.lenient)
    figures = scores(lenient_PK, seed)
    summary = {
        "problems": len(lenient_PK),
        "samples_per_problem": lenient_PK.shape[1],
        "ci95": figures["ci95_new_problems"],
        **figures,
        "mean_tokens": float(np.mean(tally.tokens)),
        "token_quantiles": {str(q): float(np.quantile(tally.tokens, q)) for q in QUANTILES},
        "truncated_share": float(np.mean(tally.truncated)),
        "empty_share": float(np.mean(tally.empty)),
        "statuses": {status: tally.statuses.count(status) for status in sorted(set(tally.statuses))},
    }
    if tally.strict:
        summary |= {"no_box_share": float(np.mean(tally.no_box)), "strict": scores(as_array(tally.strict), seed)}
    return summary


def scores(correct_PK: CorrectArray, seed: int) -> dict[str, Any]:
    """avg@k with its intervals, pass@k, and the smallest difference that could be shown."""
    num_samples = correct_PK.shape[1]
    powers = [2**exponent for exponent in range(num_samples.bit_length())]
    return {
        "accuracy": statistics.accuracy(correct_PK),
        "ci95_new_problems": statistics.interval_new_problems(correct_PK, seed),
        "ci95_new_samples": statistics.interval_new_samples(correct_PK, seed),
        "minimum_detectable_difference": statistics.minimum_detectable_difference(correct_PK),
        "pass_at": {str(k): statistics.pass_at(correct_PK, k) for k in sorted({*powers, num_samples})},
    }


def correctness(graded: Iterable[dict[str, Any]], name: str = "reward") -> CorrectArray:
    """0/1 array [problems, samples per problem], problems in the order of their first record.

    Raises:
        DataError: a problem has more or fewer samples than another.
    """
    rewards: dict[str, list[int]] = {}
    for record in graded:
        rewards.setdefault(record["problem_id"], []).append(record[name])
    return as_array(rewards)


def as_array(rewards: dict[str, list[int]]) -> CorrectArray:
    """Rewards by problem as an array [problems, samples per problem].

    Raises:
        DataError: a problem has more or fewer samples than another.
    """
    lengths = {len(values) for values in rewards.values()}
    if len(lengths) != 1:
        raise DataError("problems differ in their number of samples", expected="one number", got=sorted(lengths))
    return np.array(list(rewards.values()), dtype=np.float64)
